# Compile options shared by every target, and the helper functions that declare one.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE RelWithDebInfo CACHE STRING "" FORCE)
endif()
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1 -DNDEBUG")
if(SPARSEK_SANITIZE OR SPARSEK_FUZZ)  # assertions run where memory is watched
  set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O2 -g1")
endif()

find_program(SPARSEK_CCACHE ccache)
if(SPARSEK_CCACHE AND NOT CMAKE_CXX_COMPILER_LAUNCHER)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${SPARSEK_CCACHE})
endif()
if(SPARSEK_CCACHE AND NOT CMAKE_CUDA_COMPILER_LAUNCHER)
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${SPARSEK_CCACHE})
endif()
find_program(SPARSEK_MOLD mold)
if(SPARSEK_MOLD AND NOT SPARSEK_SANITIZE)
  add_link_options(-fuse-ld=mold)
endif()

add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Wall> $<$<COMPILE_LANGUAGE:CXX>:-Wextra> $<$<COMPILE_LANGUAGE:CXX>:-Wno-unused-parameter>)
if(SPARSEK_WERROR)
  add_compile_options($<$<COMPILE_LANGUAGE:CXX>:-Werror>)
endif()
if(SPARSEK_SANITIZE)
  add_compile_options(-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer)
  add_link_options(-fsanitize=address,undefined)
endif()
if(SPARSEK_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
endif()

# sparsek_add_library(NAME files... LINK targets...): a static library whose include root is src/.
function(sparsek_add_library name)
  cmake_parse_arguments(ARG "" "" "LINK" ${ARGN})
  add_library(${name} STATIC ${ARG_UNPARSED_ARGUMENTS})
  target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR}/src)
  target_link_libraries(${name} PUBLIC ${ARG_LINK})
endfunction()

# Instruction sets a *.simd.cc file is compiled for; the program chooses at run time (kernels/cpu/simd/dispatch.h).
set(SPARSEK_ISA_PORTABLE_FLAGS "")
set(SPARSEK_ISA_AVX2_FLAGS -mavx2 -mfma -mf16c -mbmi2)
set(SPARSEK_ISA_AVX512_FLAGS -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vbmi -mavx512vnni -mavx512bf16
    -mfma -mavx2 -mf16c -mbmi2 -mprefer-vector-width=512)

# sparsek_add_simd(LIBRARY files...): compiles each file once per instruction set, inside namespace SPARSEK_ISA
# (portable, avx2, avx512). Floating-point contraction is on: these files compute with fused multiply-adds.
function(sparsek_add_simd library)
  foreach(isa portable avx2 avx512)
    string(TOUPPER ${isa} upper)
    add_library(${library}_${isa} OBJECT ${ARGN})
    target_include_directories(${library}_${isa} PRIVATE ${PROJECT_SOURCE_DIR}/src)
    target_compile_definitions(${library}_${isa} PRIVATE SPARSEK_ISA=${isa} SPARSEK_ISA_${upper}=1)
    target_compile_options(${library}_${isa} PRIVATE -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math
                           ${SPARSEK_ISA_${upper}_FLAGS})
    if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")  # g++ 12 reports its own AVX-512 intrinsics (_mm512_undefined_ps)
      target_compile_options(${library}_${isa} PRIVATE -Wno-uninitialized -Wno-maybe-uninitialized)
    endif()
    target_link_libraries(${library}_${isa} PRIVATE sparsek_openmp)
    target_sources(${library} PRIVATE $<TARGET_OBJECTS:${library}_${isa}>)
  endforeach()
endfunction()

# sparsek_add_test(NAME files... LINK targets... LABELS labels...): a GoogleTest executable. Not part of `all`:
# `make test` builds the target `tests`.
add_custom_target(tests)
function(sparsek_add_test name)
  cmake_parse_arguments(ARG "" "" "LINK;LABELS" ${ARGN})
  add_executable(${name} EXCLUDE_FROM_ALL ${ARG_UNPARSED_ARGUMENTS})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}/src ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_LINK} GTest::gtest GTest::gmock GTest::gtest_main)
  add_dependencies(tests ${name})
  add_test(NAME ${name} COMMAND ${name})
  set_tests_properties(${name} PROPERTIES LABELS "${ARG_LABELS}"
                       ENVIRONMENT "OMP_NUM_THREADS=2;OMP_WAIT_POLICY=passive")
endfunction()

# What `make bundle` packs beside third-party code: the target `bundled` builds it, bundled.txt says where it lies.
add_custom_target(bundled)
function(sparsek_add_to_bundle name)
  add_dependencies(bundled ${name})
  set_property(GLOBAL APPEND_STRING PROPERTY SPARSEK_BUNDLED "$<TARGET_FILE:${name}>\n")
endfunction()

# A folder appears when it has content.
macro(sparsek_add_folder folder)
  if(EXISTS ${PROJECT_SOURCE_DIR}/${folder}/CMakeLists.txt)
    add_subdirectory(${folder})
  endif()
endmacro()
