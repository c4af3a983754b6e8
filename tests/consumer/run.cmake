# cmake -D... -P run.cmake: configures and builds the consumer, and runs what was built.
#   CONSUMER, BINARY_DIR    its source and build folders
#   TARGETS                 its executables to build and run, with spaces between
#   PREFIX or SOURCE        the install prefix to find the package in, or cppvmm's source tree
#   EXTENSIONS              ON, OFF, or empty: no language chosen, the compiler's default
#   GROUP                   ON: with the component vcpu_group, which needs Boost
#   BUILD_TYPE, C_COMPILER, CXX_COMPILER, ASM_COMPILER, C_FLAGS, CXX_FLAGS, NINJA    as the tree's own build has them
# With PREFIX and without GROUP, Boost is hidden from the consumer, and no file of it may be read by what is compiled.
# With both, configuring must fail first where Boost is hidden, and name what is missing.
# What is in the build folder is built again when a command or a file that it reads has changed, as by any Ninja build.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

separate_arguments(targets UNIX_COMMAND "${TARGETS}")
set(group OFF)
if(GROUP)
  set(group ON)
endif()
set(hide_boost OFF)
if(PREFIX AND NOT GROUP)
  set(hide_boost ON)
endif()
# Undefined, not empty, is what a consumer who chooses nothing has.
set(language -UCMAKE_CXX_STANDARD -UCMAKE_CXX_EXTENSIONS)
if(NOT "${EXTENSIONS}" STREQUAL "")
  set(language -DCMAKE_CXX_STANDARD=23 -DCMAKE_CXX_EXTENSIONS=${EXTENSIONS})
endif()
set(configure "${CMAKE_COMMAND}" -G Ninja "-DCMAKE_MAKE_PROGRAM=${NINJA}" -S "${CONSUMER}" -B "${BINARY_DIR}"
  "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}" "-DCMAKE_C_COMPILER=${C_COMPILER}" "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}"
  "-DCMAKE_ASM_COMPILER=${ASM_COMPILER}" "-DCMAKE_C_FLAGS=${C_FLAGS}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}"
  "-DCMAKE_PREFIX_PATH=${PREFIX}" "-DCONSUMER_SOURCE=${SOURCE}" -DCONSUMER_GROUP=${group} ${language})

if(PREFIX AND GROUP)
  execute_process(COMMAND ${configure} -DCMAKE_DISABLE_FIND_PACKAGE_Boost=ON
    RESULT_VARIABLE status ERROR_VARIABLE said OUTPUT_QUIET)
  if(status EQUAL 0 OR NOT said MATCHES "vcpu_group needs the headers of Boost")
    message(FATAL_ERROR "without Boost, find_package(cppvmm COMPONENTS vcpu_group) should say what it needs:\n${said}")
  endif()
endif()
run(${configure} -DCMAKE_DISABLE_FIND_PACKAGE_Boost=${hide_boost})
run("${CMAKE_COMMAND}" --build "${BINARY_DIR}" --parallel 2 --target ${targets})
foreach(target IN LISTS targets)
  run("${BINARY_DIR}/${target}")
endforeach()

if("${EXTENSIONS}" STREQUAL "OFF")
  execute_process(COMMAND "${NINJA}" -C "${BINARY_DIR}" -t commands consumer
    OUTPUT_VARIABLE commands COMMAND_ERROR_IS_FATAL ANY)
  if(NOT commands MATCHES " -std=c\\+\\+23 " OR commands MATCHES "[^\n]* -std=gnu[^\n]*")
    message(FATAL_ERROR "not all that a strict consumer compiles is strict: ${CMAKE_MATCH_0}")
  endif()
endif()

if(hide_boost)
  execute_process(COMMAND "${NINJA}" -C "${BINARY_DIR}" -t deps OUTPUT_VARIABLE read_files COMMAND_ERROR_IS_FATAL ANY)
  if(NOT read_files MATCHES "/expected\n")
    message(FATAL_ERROR "ninja's record of what was read lacks <expected>, which every consumer reads:\n${read_files}")
  endif()
  if(read_files MATCHES "[^\n]*/boost/[^\n]*")
    message(FATAL_ERROR "the consumer read a file of Boost: ${CMAKE_MATCH_0}")
  endif()
endif()
