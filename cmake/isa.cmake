# tsam_isa: csrc/cpu/kernels.cpp once per instruction set, and csrc/cpu/isa.cpp that picks one at run time.
#
# Each object holds its code in a namespace of its own (TSAM_ISA); no flag of one set reaches another's file.
add_library(tsam_isa INTERFACE)

option(TSAM_BASELINE_ONLY "Build one set of kernels alone, not at -O3, for tests that rebuild often" OFF)

function(tsam_add_isa name)
  add_library(tsam_kernels_${name} OBJECT csrc/cpu/kernels.cpp)
  target_link_libraries(tsam_kernels_${name} PRIVATE tsam_flags)
  target_compile_definitions(tsam_kernels_${name} PRIVATE TSAM_ISA=${name})
  if(NOT TSAM_BASELINE_ONLY)
    target_compile_options(tsam_kernels_${name} PRIVATE -O3)
  endif()
  target_compile_options(tsam_kernels_${name} PRIVATE ${ARGN})
  target_sources(tsam_isa INTERFACE $<TARGET_OBJECTS:tsam_kernels_${name}>)
endfunction()

tsam_add_isa(baseline)
target_sources(tsam_isa INTERFACE "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cpu/isa.cpp")
if(NOT TSAM_BASELINE_ONLY AND CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$" AND CMAKE_SIZEOF_VOID_P EQUAL 8)
  tsam_add_isa(avx2 -mavx2 -mfma -mf16c)
  tsam_add_isa(avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
  target_compile_definitions(tsam_isa INTERFACE TSAM_HAVE_X86_ISA=1)
endif()
