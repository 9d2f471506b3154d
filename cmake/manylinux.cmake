# TSAM_MANYLINUX: _C and tsam_cuda ask for nothing above manylinux_2_28 (glibc 2.28), whatever this machine has.
#
# They are linked to stubs of its C and C++ libraries that end at those versions (manylinux.py), and define the few things
# that newer headers call and older libraries lack (manylinux.cpp). Each library is then checked, or its link fails.
if(NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" OR NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  message(FATAL_ERROR
    "TSAM_MANYLINUX needs x86-64 and g++, found ${CMAKE_SYSTEM_PROCESSOR} and ${CMAKE_CXX_COMPILER_ID}")
endif()

set(TSAM_MANYLINUX_SCRIPT "${CMAKE_CURRENT_LIST_DIR}/manylinux.py")
set(TSAM_MANYLINUX_STUBS "${CMAKE_CURRENT_BINARY_DIR}/manylinux")
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${TSAM_MANYLINUX_SCRIPT}" stubs "${TSAM_MANYLINUX_STUBS}" "${CMAKE_CXX_COMPILER}"
  COMMAND_ERROR_IS_FATAL ANY)
message(STATUS "manylinux_2_28: stubs in ${TSAM_MANYLINUX_STUBS}")

# -fno-lto: link-time optimisation loses the .symver lines.
add_library(tsam_manylinux OBJECT "${CMAKE_CURRENT_LIST_DIR}/manylinux.cpp")
target_link_libraries(tsam_manylinux PRIVATE tsam_flags)
target_compile_options(tsam_manylinux PRIVATE -fno-lto)

foreach(target _C tsam_cuda)
  if(TARGET ${target})
    target_sources(${target} PRIVATE $<TARGET_OBJECTS:tsam_manylinux>)
    # The compiler's own -lstdc++ -lm -lc look here before they look where it keeps its libraries.
    target_link_options(${target} PRIVATE "-L${TSAM_MANYLINUX_STUBS}")
    add_custom_command(TARGET ${target} POST_BUILD
      COMMAND "${Python_EXECUTABLE}" "${TSAM_MANYLINUX_SCRIPT}" check "$<TARGET_FILE:${target}>" VERBATIM)
  endif()
endforeach()
