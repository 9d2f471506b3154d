# TSAM_EMULATE_CUDA: for tests. The extension module with the CUDA ops in place of the CPU ones: csrc/cuda compiled by the
# host's compiler over the shim in this folder, registered for CPU tensors (launch.h). Never part of a wheel.
#
# For each csrc/cpu/X_cpu.cpp its csrc/cuda/X_cuda.cu; where there is none yet, the CPU ops remain.
# simt.h has functions for tests, to be called by ctypes.
set(TSAM_EXPORTS "${CMAKE_CURRENT_LIST_DIR}/exports.map")
set(TSAM_EMULATED "")
set(TSAM_KERNELS_LEFT OFF)
foreach(name IN ITEMS ops differentiable hmc)
  if(EXISTS "${PROJECT_SOURCE_DIR}/csrc/cuda/${name}_cuda.cu")
    set(file "csrc/cuda/${name}_cuda.cu")
    set_source_files_properties("${file}" PROPERTIES LANGUAGE CXX COMPILE_OPTIONS "-x;c++")
  else()
    set(file "csrc/cpu/${name}_cpu.cpp")
    set(TSAM_KERNELS_LEFT ON)
    message(STATUS "not emulated: ${name}")
  endif()
  list(APPEND TSAM_EMULATED "${file}")
endforeach()

pybind11_add_module(_C MODULE NO_EXTRAS csrc/module.cpp csrc/ops/schema.cpp tests/simt/simt.cpp ${TSAM_EMULATED})
if(TSAM_KERNELS_LEFT)
  target_link_libraries(_C PRIVATE tsam_isa)
else()
  target_sources(_C PRIVATE tests/simt/isa_name.cpp)
endif()
target_compile_definitions(_C PRIVATE TSAM_SIMT)
target_include_directories(_C PRIVATE tests/simt)
# What a kernel reads through a vector of words it may have written as floats. Native: fma is an instruction, not a call.
target_compile_options(_C PRIVATE -fno-strict-aliasing -Wno-missing-field-initializers -march=native)
