/* An empty library that bears the name of torch's at link time: it makes the module ask for libtorch_cpu.so by name,
   and at run time the one that `import torch` has loaded answers. No torch library is linked, whatever its build. */
