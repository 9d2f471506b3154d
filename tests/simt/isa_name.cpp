// The name of the emulated back end, where _C.__isa__ has that of the CPU's instruction set.
//
// Only for a module without CPU kernels (emulate.cmake); csrc/cpu/isa.cpp defines the same function otherwise.
namespace tsam {
namespace cpu {

const char* isa_name() { return "simt"; }

}  // namespace cpu
}  // namespace tsam
