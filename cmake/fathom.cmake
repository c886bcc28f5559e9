# How every folder is built: one library per folder, programs in build/PRESET/bin, warnings as errors.

set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_CXX_FLAGS_RELEASE "-O2")  # no NDEBUG: CHECKs and library assertions stay in all builds
set(CMAKE_CXX_FLAGS_RELWITHDEBINFO "-O1 -g1 -fno-omit-frame-pointer")

find_program(CCACHE ccache)
if(CCACHE)
  set(CMAKE_CXX_COMPILER_LAUNCHER ${CCACHE})
endif()
# Without ccache every build is a first one, so then headers are read less often: several files of a
# library are compiled as one, and what most tests include is precompiled. ccache does better from the
# second build on: it would keep nothing precompiled, and one edit would cost the whole of several files.
if(CCACHE OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  set(unity OFF)
else()
  set(unity ON)
endif()
option(FATHOM_UNITY "Compile several files as one; by default with g++ where ccache is not installed" ${unity})
set(CMAKE_UNITY_BUILD ${FATHOM_UNITY})
set(CMAKE_UNITY_BUILD_BATCH_SIZE 12)
if(FATHOM_UNITY)
  add_compile_options(-Wno-subobject-linkage)  # it takes the files for headers
endif()
find_program(MOLD mold)
if(MOLD)
  add_link_options(-fuse-ld=mold)
endif()

set(FATHOM_SANITIZE "" CACHE STRING "Sanitizers, e.g. address,undefined or thread")
if(FATHOM_SANITIZE)
  add_compile_options(-fsanitize=${FATHOM_SANITIZE} -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${FATHOM_SANITIZE})
endif()

option(FATHOM_FUZZ "Build tests/fuzz for libFuzzer (preset fuzz); needs clang" OFF)
if(FATHOM_FUZZ)
  add_compile_options(-fsanitize=fuzzer-no-link)
  add_compile_definitions(BOOST_ASIO_HAS_CO_AWAIT=1)  # 1.74 does not know that clang 14 has them
endif()

find_package(Threads REQUIRED)
find_package(absl REQUIRED)
find_package(Protobuf REQUIRED)
find_package(gRPC REQUIRED)
find_package(spdlog REQUIRED)
find_package(CLI11 REQUIRED)
find_package(simdjson REQUIRED)
find_package(prometheus-cpp REQUIRED COMPONENTS core)
find_package(Boost 1.74 REQUIRED)
find_package(OpenSSL 3.0 REQUIRED)
find_package(hwy REQUIRED)
find_package(Gloo REQUIRED)
find_package(GTest REQUIRED)
find_package(PkgConfig REQUIRED)
pkg_check_modules(xxhash REQUIRED IMPORTED_TARGET libxxhash)

# fathom_warnings(TARGET): our own code compiles without a warning; generated code is not ours.
function(fathom_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Werror -Wvla -Wnon-virtual-dtor>)
endfunction()

# fathom_kernels_for(NAME ARCHITECTURES SOURCES...): .cu files compiled for these GPUs. They see no
# header of Abseil: nvcc is slow enough without.
function(fathom_kernels_for name architectures)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  set_target_properties(${name} PROPERTIES CUDA_ARCHITECTURES "${architectures}" CUDA_STANDARD 20
    UNITY_BUILD OFF)
  target_compile_options(${name} PRIVATE
    --compiler-options=-Wall,-Wextra --Werror=all-warnings --expt-relaxed-constexpr)
endfunction()

# fathom_library(NAME SOURCES... DEPENDS...): the library of one folder.
function(fathom_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  if(ARG_SOURCES)
    add_library(${name} STATIC ${ARG_SOURCES})
    target_include_directories(${name} PUBLIC ${PROJECT_SOURCE_DIR})
    target_link_libraries(${name} PUBLIC ${ARG_DEPENDS})
    fathom_warnings(${name})
  else()
    add_library(${name} INTERFACE)
    target_include_directories(${name} INTERFACE ${PROJECT_SOURCE_DIR})
    target_link_libraries(${name} INTERFACE ${ARG_DEPENDS})
  endif()
endfunction()

# fathom_program(NAME SOURCES... DEPENDS...): a program in bin/.
function(fathom_program name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPENDS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_definitions(${name} PRIVATE FATHOM_VERSION="${PROJECT_VERSION}")
  target_link_libraries(${name} PRIVATE ${ARG_DEPENDS})
  fathom_warnings(${name})
endfunction()

# fathom_test(NAME SOURCES... DEPENDS... [TIMEOUT seconds]): a GoogleTest program, one ctest entry per
# program. It runs in the source tree, so tests/golden/... is a valid path.
function(fathom_test name)
  cmake_parse_arguments(ARG "" "TIMEOUT" "SOURCES;DEPENDS" ${ARGN})
  if(NOT ARG_TIMEOUT)
    set(ARG_TIMEOUT 120)
  endif()
  add_executable(${name} ${ARG_SOURCES})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(${name} PRIVATE ${ARG_DEPENDS} GTest::gtest GTest::gmock GTest::gtest_main)
  fathom_warnings(${name})
  if(TARGET fathom_precompiled_tests)
    target_precompile_headers(${name} REUSE_FROM fathom_precompiled_tests)
    # g++ wants every macro that the headers saw; -pthread makes one.
    target_compile_definitions(${name} PRIVATE
      $<TARGET_PROPERTY:fathom_precompiled_tests,COMPILE_DEFINITIONS>)
    target_compile_options(${name} PRIVATE -pthread)
  endif()
  set_target_properties(${name} PROPERTIES RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/tests)
  add_test(NAME ${name} COMMAND ${name} WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  set_tests_properties(${name} PROPERTIES TIMEOUT ${ARG_TIMEOUT})
endfunction()
