# Third-party code. torch comes from a Python environment (./.venv unless SPARSEK_PYTHON names another); its headers
# are system headers, so our warnings do not apply to them.
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
find_package(fmt REQUIRED)
find_package(nlohmann_json REQUIRED)
if(SKBUILD)  # a wheel holds the operations only, built against the torch of the Python that builds it
  set(SPARSEK_PYTHON ${Python_EXECUTABLE})
  set(SPARSEK_FMT fmt::fmt-header-only)  # so that nothing but torch has to be there where it is installed
else()
  set(SPARSEK_FMT fmt::fmt)
  find_package(CLI11 REQUIRED)
  find_package(GTest REQUIRED)
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(PCRE2 REQUIRED IMPORTED_TARGET libpcre2-8)
endif()

set(SPARSEK_PYTHON "${PROJECT_SOURCE_DIR}/.venv/bin/python" CACHE FILEPATH "Python whose torch the build uses")
if(NOT Torch_DIR)
  execute_process(COMMAND ${SPARSEK_PYTHON} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                  OUTPUT_VARIABLE SPARSEK_TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE SPARSEK_TORCH_MISSING)
  if(SPARSEK_TORCH_MISSING)
    message(FATAL_ERROR "no torch in ${SPARSEK_PYTHON}: run `make setup`, or pass -DSPARSEK_PYTHON=/path/to/python")
  endif()
  set(Torch_DIR ${SPARSEK_TORCH_ROOT}/share/cmake/Torch)
endif()
find_package(Torch REQUIRED)

add_library(sparsek_torch INTERFACE)
target_include_directories(sparsek_torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIRS})
target_link_libraries(sparsek_torch INTERFACE ${TORCH_LIBRARIES} sparsek_openmp)
# torch's headers bring their own fmt, of another version than the system's library: there it is used without one.
target_compile_definitions(sparsek_torch INTERFACE FMT_HEADER_ONLY=1)
