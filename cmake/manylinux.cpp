// What newer headers of glibc and libstdc++ call and the libraries of manylinux_2_28 do not have, defined here.
//
// Linked into the module and the CUDA library where TSAM_MANYLINUX is on; the version scripts keep every name inside.
// The C++ library itself stays the shared one that torch uses: exceptions and their types cross into torch and back.
#include <exception>
#include <new>
#include <sstream>

extern "C" {

// glibc 2.32. Zero says that there may be threads, so reference counts stay atomic.
char __libc_single_threaded = 0;

// What older libraries export instead of _M_addref and _M_release. Bound by version: without one the linker would take
// the inline twins that other files may carry, and those call what is defined below.
void tsam_exception_copy(void* to, const void* from) noexcept;
void tsam_exception_destroy(void* holder) noexcept;
__asm__(".symver tsam_exception_copy, _ZNSt15__exception_ptr13exception_ptrC1ERKS0_@CXXABI_1.3.3");
__asm__(".symver tsam_exception_destroy, _ZNSt15__exception_ptr13exception_ptrD1Ev@CXXABI_1.3.3");

}  // extern "C"

namespace std {

// CXXABI_1.3.13. A copy that nobody destroys counts one holder more, and a destroyed copy of the bits one less.
namespace __exception_ptr {

void exception_ptr::_M_addref() noexcept {
  void* uncounted;
  tsam_exception_copy(&uncounted, this);
}

void exception_ptr::_M_release() noexcept {
  tsam_exception_destroy(this);
  _M_exception_object = nullptr;
}

}  // namespace __exception_ptr

// GLIBCXX_3.4.29: an allocator asked for more bytes than a size_t counts.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// GLIBCXX_3.4.26: streams constructed without an argument.
template basic_stringbuf<char>::basic_stringbuf();
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
