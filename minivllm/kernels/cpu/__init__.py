"""The ops for CPUs in C++: one source file, compiled with this machine's compiler, called through plain C functions."""
