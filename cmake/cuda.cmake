# tsam_cuda: libtsam_cuda.so, the ops on CUDA tensors. Python loads it where torch is a CUDA build (_cuda.py).
#
# Nothing of CUDA is needed at run time but the driver: the runtime is linked statically, as the one that torch brings
# has another version on each machine. No torch with CUDA is needed to build: a stub bears its library's name.
set(TSAM_CUDA AUTO CACHE STRING "Build the CUDA library: AUTO (where nvcc is found), ON or OFF")
set_property(CACHE TSAM_CUDA PROPERTY STRINGS AUTO ON OFF)
set(TSAM_CUDA_ARCHITECTURES "75-real;80-real;90-real;100-real;120" CACHE STRING "As CMAKE_CUDA_ARCHITECTURES")
set(TSAM_CUDA_OLDEST 12.8) # the first nvcc that knows sm_100 and sm_120

if(NOT TSAM_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "TSAM_CUDA is ${TSAM_CUDA}: AUTO, ON or OFF?")
endif()
if(TSAM_CUDA STREQUAL "OFF")
  message(STATUS "CUDA: off (TSAM_CUDA)")
  return()
endif()

include(CheckLanguage)
set(CMAKE_CUDA_ARCHITECTURES "${TSAM_CUDA_ARCHITECTURES}")
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  enable_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS TSAM_CUDA_OLDEST)
  set(TSAM_CUDA_FOUND "nvcc ${TSAM_CUDA_OLDEST} or newer, found ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}")
  if(TSAM_CUDA STREQUAL "ON")
    message(FATAL_ERROR "TSAM_CUDA=ON needs ${TSAM_CUDA_FOUND}")
  endif()
  message(STATUS "CUDA: not built (needs ${TSAM_CUDA_FOUND})")
  return()
endif()
message(STATUS "CUDA: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${TSAM_CUDA_ARCHITECTURES}")

add_library(tsam_torch_cuda_stub SHARED "${CMAKE_CURRENT_LIST_DIR}/stub.c")
set_target_properties(tsam_torch_cuda_stub PROPERTIES
  OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

add_library(tsam_cuda MODULE
  csrc/cuda/ops_cuda.cu
  csrc/cuda/differentiable_cuda.cu
  csrc/cuda/hmc_cuda.cu
  csrc/cuda/versions.cu)
set_target_properties(tsam_cuda PROPERTIES
  CUDA_STANDARD 17
  CUDA_STANDARD_REQUIRED ON
  CUDA_EXTENSIONS OFF
  CUDA_VISIBILITY_PRESET hidden
  CUDA_RUNTIME_LIBRARY Static
  LINK_DEPENDS "${CMAKE_CURRENT_LIST_DIR}/cuda_exports.map")
target_link_libraries(tsam_cuda PRIVATE tsam_torch tsam_torch_cuda_stub)
target_link_options(tsam_cuda PRIVATE "LINKER:--version-script=${CMAKE_CURRENT_LIST_DIR}/cuda_exports.map" LINKER:-s)
# -fmad=false: as -ffp-contract=off on the host (flags.cmake), so that both give the same bits.
target_compile_options(tsam_cuda PRIVATE
  -fmad=false
  --compress-mode=size
  "-Xcompiler=-ffp-contract=off,-Wall,-Wextra,-fmacro-prefix-map=${CMAKE_CURRENT_SOURCE_DIR}/=")
if(TSAM_WERROR)
  target_compile_options(tsam_cuda PRIVATE -Werror=all-warnings
    -Xcompiler=-Werror -Xptxas=-warn-spills,-warn-lmem-usage,-Werror)
endif()

install(TARGETS tsam_cuda LIBRARY DESTINATION tsam_ext)
