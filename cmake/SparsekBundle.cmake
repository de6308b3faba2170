# A bundle (scripts/bundle.sh) in place of the system's packages: the same targets, from the headers and libraries in it.
#   cmake -DSPARSEK_FINGERPRINT=1 -P cmake/SparsekBundle.cmake     prints the fingerprint of the CUDA sources beside it

# What the prebuilt CUDA libraries were made from: one hash over all their sources.
function(sparsek_cuda_fingerprint root result)
  file(GLOB_RECURSE sources RELATIVE ${root} ${root}/src/kernels/cuda/* ${root}/src/ops/cuda/* ${root}/src/kernels/params.h
       ${root}/src/base/dtype.h ${root}/src/ops/far_lists.h ${root}/src/ops/row_params.h)
  list(SORT sources)
  set(hashes "")
  foreach(source ${sources})
    file(SHA256 ${root}/${source} hash)
    string(APPEND hashes "${source} ${hash}\n")
  endforeach()
  string(SHA256 hash "${hashes}")
  set(${result} ${hash} PARENT_SCOPE)
endfunction()

if(SPARSEK_FINGERPRINT)
  get_filename_component(root ${CMAKE_CURRENT_LIST_DIR} DIRECTORY)
  sparsek_cuda_fingerprint(${root} fingerprint)
  execute_process(COMMAND ${CMAKE_COMMAND} -E echo ${fingerprint})  # message() would print to stderr
  return()
endif()

if(NOT EXISTS ${SPARSEK_BUNDLE}/MANIFEST)
  message(FATAL_ERROR "SPARSEK_BUNDLE: expected the folder of an unpacked bundle (`make bundle`), found no MANIFEST in ${SPARSEK_BUNDLE}")
endif()
message(STATUS "bundle: ${SPARSEK_BUNDLE}")

# sparsek_bundled(TARGET [library]): headers of the bundle, and a static library of it.
function(sparsek_bundled name)
  if(ARGC EQUAL 1)
    add_library(${name} INTERFACE IMPORTED GLOBAL)
  else()
    add_library(${name} STATIC IMPORTED GLOBAL)
    set_target_properties(${name} PROPERTIES IMPORTED_LOCATION ${SPARSEK_BUNDLE}/lib/${ARGV1})
  endif()
  set_target_properties(${name} PROPERTIES INTERFACE_INCLUDE_DIRECTORIES ${SPARSEK_BUNDLE}/include)
endfunction()

foreach(name fmt::fmt fmt::fmt-header-only)
  sparsek_bundled(${name})
  set_target_properties(${name} PROPERTIES INTERFACE_COMPILE_DEFINITIONS FMT_HEADER_ONLY=1)
endforeach()
sparsek_bundled(nlohmann_json::nlohmann_json)
sparsek_bundled(CLI11::CLI11)
sparsek_bundled(PkgConfig::PCRE2 libpcre2-8.a)
sparsek_bundled(PkgConfig::UTF8PROC libutf8proc.a)
set_target_properties(PkgConfig::UTF8PROC PROPERTIES INTERFACE_COMPILE_DEFINITIONS UTF8PROC_STATIC)
sparsek_bundled(ZLIB::ZLIB libz.a)
sparsek_bundled(GTest::gtest libgtest.a)
sparsek_bundled(GTest::gmock libgmock.a)
sparsek_bundled(GTest::gtest_main libgtest_main.a)
target_link_libraries(GTest::gtest INTERFACE Threads::Threads)
target_link_libraries(GTest::gmock INTERFACE GTest::gtest)
target_link_libraries(GTest::gtest_main INTERFACE GTest::gtest)

# The kernels come compiled: nothing then needs nvcc. A bundle without them leaves them to be compiled here.
if(SPARSEK_CUDA AND EXISTS ${SPARSEK_BUNDLE}/lib/libsparsek_cuda.a)
  sparsek_cuda_fingerprint(${PROJECT_SOURCE_DIR} fingerprint)
  file(STRINGS ${SPARSEK_BUNDLE}/MANIFEST bundled REGEX "^cuda_sources ")
  if(NOT bundled STREQUAL "cuda_sources ${fingerprint}")
    message(FATAL_ERROR "SPARSEK_BUNDLE: expected CUDA libraries of these sources (${fingerprint}), found ${bundled}: "
                        "run `make bundle` again, check out the bundle's commit, or delete its lib/libsparsek_cuda*: "
                        "then nvcc compiles the kernels here")
  endif()
  find_package(CUDAToolkit REQUIRED)  # headers; the library comes along, so that its version is the compiled kernels'
  sparsek_bundled(sparsek_cuda_archive libsparsek_cuda.a)
  sparsek_bundled(sparsek_cudart libcudart_static.a)
  add_library(sparsek_cuda INTERFACE)
  target_include_directories(sparsek_cuda INTERFACE ${PROJECT_SOURCE_DIR}/src)
  target_include_directories(sparsek_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
  target_link_libraries(sparsek_cuda INTERFACE sparsek_cuda_archive sparsek_cudart Threads::Threads rt ${CMAKE_DL_LIBS})
endif()
