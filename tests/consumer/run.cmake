# cmake -D... -P run.cmake: configures, builds and runs the consumer once, from nothing.
#   CONSUMER, BINARY_DIR    its source and build folders
#   PREFIX or SOURCE        the install prefix to find the package in, or cppvmm's source tree
#   EXTENSIONS              ON, OFF, or empty for the compiler's default
#   BUILD_TYPE, C_COMPILER, CXX_COMPILER, ASM_COMPILER, C_FLAGS, CXX_FLAGS    as the tree's own build has them
# With PREFIX, Boost is hidden from the consumer, and no file of it may be read by any of its compilations.
function(run)
  execute_process(COMMAND ${ARGN} COMMAND_ERROR_IS_FATAL ANY)
endfunction()

set(options)
if(NOT "${EXTENSIONS}" STREQUAL "")
  list(APPEND options -DCMAKE_CXX_STANDARD=23 -DCMAKE_CXX_EXTENSIONS=${EXTENSIONS})
endif()
if(PREFIX)
  list(APPEND options "-DCMAKE_PREFIX_PATH=${PREFIX}" -DCMAKE_DISABLE_FIND_PACKAGE_Boost=ON)
else()
  list(APPEND options "-DCONSUMER_SOURCE=${SOURCE}")
endif()
run("${CMAKE_COMMAND}" --fresh -G Ninja -S "${CONSUMER}" -B "${BINARY_DIR}" ${options}
  "-DCMAKE_BUILD_TYPE=${BUILD_TYPE}" "-DCMAKE_C_COMPILER=${C_COMPILER}" "-DCMAKE_CXX_COMPILER=${CXX_COMPILER}"
  "-DCMAKE_ASM_COMPILER=${ASM_COMPILER}" "-DCMAKE_C_FLAGS=${C_FLAGS}" "-DCMAKE_CXX_FLAGS=${CXX_FLAGS}")
run("${CMAKE_COMMAND}" --build "${BINARY_DIR}" --target consumer --clean-first)
run("${BINARY_DIR}/consumer")

if(PREFIX)
  execute_process(COMMAND ninja -C "${BINARY_DIR}" -t deps OUTPUT_VARIABLE read_files COMMAND_ERROR_IS_FATAL ANY)
  if(NOT read_files MATCHES "/expected\n")
    message(FATAL_ERROR "ninja's record of what was read lacks <expected>, which every consumer reads:\n${read_files}")
  endif()
  if(read_files MATCHES "[^\n]*/boost/[^\n]*")
    message(FATAL_ERROR "the consumer read a file of Boost: ${CMAKE_MATCH_0}")
  endif()
endif()
