# cmake -D... -P run.cmake: configures, builds and runs the consumer once, from nothing.
#   CONSUMER, BINARY_DIR    its source and build folders
#   PREFIX or SOURCE        the install prefix to find the package in, or cppvmm's source tree
#   EXTENSIONS              ON, OFF, or empty for the compiler's default
#   GROUP                   ON: with the component vcpu_group, which needs Boost
#   BUILD_TYPE, C_COMPILER, CXX_COMPILER, ASM_COMPILER, C_FLAGS, CXX_FLAGS, NINJA    as the tree's own build has them
# With PREFIX and without GROUP, Boost is hidden from the consumer, and no file of it may be read by any compilation.
# With both, configuring must fail first where Boost is hidden, and name what is missing.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(hide_boost -DCMAKE_DISABLE_FIND_PACKAGE_Boost=ON)
set(options)
if(NOT "${EXTENSIONS}" STREQUAL "")
  list(APPEND options -DCMAKE_CXX_STANDARD=23 -DCMAKE_CXX_EXTENSIONS=${EXTENSIONS})
endif()
if(PREFIX)
  list(APPEND options "-DCMAKE_PREFIX_PATH=${PREFIX}")
else()
  list(APPEND options "-DCONSUMER_SOURCE=${SOURCE}")
endif()
if(GROUP)
  list(APPEND options -DCONSUMER_GROUP=ON)
elseif(PREFIX)
  list(APPEND options ${hide_boost})
endif()
set(configure "${CMAKE_COMMAND}" --fresh -G Ninja "-DCMAKE_MAKE_PROGRAM=${NINJA}" -S "${CONSUMER}" -B "${BINARY_DIR}"
  "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}" "-DCMAKE_C_COMPILER=${C_COMPILER}" "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}"
  "-DCMAKE_ASM_COMPILER=${ASM_COMPILER}" "-DCMAKE_C_FLAGS=${C_FLAGS}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}" ${options})

if(PREFIX AND GROUP)
  execute_process(COMMAND ${configure} ${hide_boost} RESULT_VARIABLE status ERROR_VARIABLE said OUTPUT_QUIET)
  if(status EQUAL 0 OR NOT said MATCHES "vcpu_group needs the headers of Boost")
    message(FATAL_ERROR "without Boost, find_package(cppvmm COMPONENTS vcpu_group) should say what it needs:\n${said}")
  endif()
endif()
run(${configure})
run("${CMAKE_COMMAND}" --build "${BINARY_DIR}" --target consumer --clean-first)
run("${BINARY_DIR}/consumer")

if(PREFIX AND NOT GROUP)
  execute_process(COMMAND "${NINJA}" -C "${BINARY_DIR}" -t deps OUTPUT_VARIABLE read_files COMMAND_ERROR_IS_FATAL ANY)
  if(NOT read_files MATCHES "/expected\n")
    message(FATAL_ERROR "ninja's record of what was read lacks <expected>, which every consumer reads:\n${read_files}")
  endif()
  if(read_files MATCHES "[^\n]*/boost/[^\n]*")
    message(FATAL_ERROR "the consumer read a file of Boost: ${CMAKE_MATCH_0}")
  endif()
endif()
