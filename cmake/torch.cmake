# tsam_torch: torch's stable headers and the name of its library, from the torch that cmake/find_torch.py finds.
#
# The headers are seen through a link in the build folder, one per torch, so that nothing else of torch/include (ATen,
# c10, an older pybind11) can be picked up, and a change of torch changes the command lines and so rebuilds.
execute_process(
  COMMAND "${Python_EXECUTABLE}" "${CMAKE_CURRENT_LIST_DIR}/find_torch.py"
  OUTPUT_VARIABLE TSAM_TORCH_FOLDER ERROR_VARIABLE TSAM_TORCH_ERROR RESULT_VARIABLE TSAM_TORCH_RESULT
  OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_STRIP_TRAILING_WHITESPACE)
if(NOT TSAM_TORCH_RESULT EQUAL 0)
  message(FATAL_ERROR "${TSAM_TORCH_ERROR}")
endif()
message(STATUS "torch's headers: ${TSAM_TORCH_FOLDER}")

string(SHA1 TSAM_TORCH_KEY "${TSAM_TORCH_FOLDER}")
string(SUBSTRING "${TSAM_TORCH_KEY}" 0 8 TSAM_TORCH_KEY)
set(TSAM_TORCH_INCLUDE "${CMAKE_CURRENT_BINARY_DIR}/torch-${TSAM_TORCH_KEY}")
file(MAKE_DIRECTORY "${TSAM_TORCH_INCLUDE}")
file(CREATE_LINK "${TSAM_TORCH_FOLDER}/include/torch" "${TSAM_TORCH_INCLUDE}/torch" SYMBOLIC)

# --no-as-needed: the stub defines nothing, and some compilers drop such a library by default.
add_library(tsam_torch_stub SHARED "${CMAKE_CURRENT_LIST_DIR}/stub.c")
set_target_properties(tsam_torch_stub PROPERTIES
  OUTPUT_NAME torch_cpu LIBRARY_OUTPUT_DIRECTORY "${CMAKE_CURRENT_BINARY_DIR}/stub")

add_library(tsam_torch INTERFACE)
target_include_directories(tsam_torch SYSTEM INTERFACE "${TSAM_TORCH_INCLUDE}")
target_compile_definitions(tsam_torch INTERFACE TORCH_TARGET_VERSION=0x020A000000000000)
target_compile_options(tsam_torch INTERFACE
  "$<$<COMPILE_LANGUAGE:CUDA>:-Xcompiler=>-fmacro-prefix-map=${TSAM_TORCH_INCLUDE}/=")
target_link_options(tsam_torch INTERFACE LINKER:--no-as-needed)
target_link_libraries(tsam_torch INTERFACE tsam_torch_stub)
