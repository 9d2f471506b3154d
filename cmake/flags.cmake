# tsam_flags: how every file of ours is compiled.
#
# The same seed must give the same bits on every machine, so the compiler may not contract a*b+c by itself (the sources
# say fma where they mean it) nor assume anything about NaN, infinities or order. That errno and floating-point traps
# are not looked at changes no value and lets loops vectorise.
add_library(tsam_flags INTERFACE)
target_compile_options(tsam_flags INTERFACE
  -ffp-contract=off
  -fno-math-errno
  -fno-trapping-math
  "-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/="
  -Wall
  -Wextra)
if(TSAM_WERROR)
  target_compile_options(tsam_flags INTERFACE -Werror)
endif()
