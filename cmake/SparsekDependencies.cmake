# Third-party code: from the system's packages, or, with SPARSEK_BUNDLE, from an unpacked bundle (scripts/bundle.sh).
find_package(OpenMP REQUIRED COMPONENTS CXX)
add_library(sparsek_openmp INTERFACE)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  # Not FindOpenMP's target: it names libgomp by its full path, which hides torch's own libgomp.so.1 from the run path.
  target_compile_options(sparsek_openmp INTERFACE $<$<COMPILE_LANGUAGE:CXX>:-fopenmp>)
  target_link_options(sparsek_openmp INTERFACE -fopenmp)
else()
  target_link_libraries(sparsek_openmp INTERFACE OpenMP::OpenMP_CXX)
endif()
find_package(Threads REQUIRED)
if(SPARSEK_BUNDLE)
  include(SparsekBundle)
  set(SPARSEK_FMT fmt::fmt)
elseif(SKBUILD)  # a wheel holds the operations only
  find_package(fmt REQUIRED)
  find_package(nlohmann_json REQUIRED)
  set(SPARSEK_FMT fmt::fmt-header-only)  # so that nothing but torch has to be there where it is installed
else()
  find_package(fmt REQUIRED)
  find_package(nlohmann_json REQUIRED)
  find_package(CLI11 REQUIRED)
  find_package(GTest REQUIRED)
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
  pkg_check_modules(UTF8PROC REQUIRED IMPORTED_TARGET libutf8proc)  # NFC, which the Qwen tokenizers want
  find_package(ZLIB REQUIRED)  # .gz corpora
  set(SPARSEK_FMT fmt::fmt)
endif()
if(SPARSEK_CUDA)
  set(SPARSEK_FMT fmt::fmt-header-only)  # the kernels' test and timing programs go to machines without this library
endif()

# torch comes from a Python environment. Its own CMake files are not used: for a torch with CUDA they want the whole toolkit
# and its compiler, and ours is linked against its libraries alone.
if(SKBUILD)
  set(SPARSEK_PYTHON ${Python_EXECUTABLE})  # the one that builds the wheel
elseif(SPARSEK_BUNDLE)
  find_program(SPARSEK_PYTHON python3 DOC "Python whose torch the build uses")  # a GPU host's own
else()
  set(SPARSEK_PYTHON "${PROJECT_SOURCE_DIR}/.venv/bin/python" CACHE FILEPATH "Python whose torch the build uses")
endif()
execute_process(COMMAND ${SPARSEK_PYTHON} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                OUTPUT_VARIABLE SPARSEK_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET
                RESULT_VARIABLE SPARSEK_TORCH_MISSING)
if(SPARSEK_TORCH_MISSING)
  message(FATAL_ERROR "no torch in ${SPARSEK_PYTHON}: run `make setup`, or pass -DSPARSEK_PYTHON=/path/to/python")
endif()
message(STATUS "torch: ${SPARSEK_TORCH_ROOT}")

# Its headers are system headers, so our warnings do not apply to them.
add_library(sparsek_torch INTERFACE)
target_include_directories(sparsek_torch SYSTEM INTERFACE ${SPARSEK_TORCH_ROOT}/include
                           ${SPARSEK_TORCH_ROOT}/include/torch/csrc/api/include)
foreach(library torch torch_cpu c10 c10_cuda torch_cuda)
  set(path ${SPARSEK_TORCH_ROOT}/lib/lib${library}.so)
  if(EXISTS ${path})
    add_library(torch::${library} SHARED IMPORTED)
    set_target_properties(torch::${library} PROPERTIES IMPORTED_LOCATION ${path})
    target_link_libraries(sparsek_torch INTERFACE torch::${library})
  endif()
endforeach()
# Our programs name no symbol of libtorch_cuda, which registers its kernels when it is loaded; and what it needs itself lies in
# folders that only the loader finds.
target_link_options(sparsek_torch INTERFACE LINKER:--no-as-needed)
# The C++ library is asked before torch's: some builds of those export parts of one of their own (2.11 with CUDA has a
# std::filesystem::remove_all that jumps to address 0).
target_link_options(sparsek_torch INTERFACE -lstdc++)
if(TARGET torch::torch_cuda)
  target_link_options(sparsek_torch INTERFACE LINKER:--allow-shlib-undefined)
  # What the headers of such a torch include: the toolkit's, or those that came with torch, where they are whole (the runtime's
  # package alone lacks crt/, which is the compiler's).
  find_path(SPARSEK_CUDA_INCLUDE crt/host_config.h HINTS ${SPARSEK_TORCH_ROOT}/../nvidia/cu13/include
            ${SPARSEK_TORCH_ROOT}/../nvidia/cuda_runtime/include /usr/local/cuda/include)
endif()
target_link_libraries(sparsek_torch INTERFACE sparsek_openmp)
# torch's headers bring their own fmt, of another version than the system's library: there it is used without one.
target_compile_definitions(sparsek_torch INTERFACE FMT_HEADER_ONLY=1)
