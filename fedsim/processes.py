"""Environment of the processes that train."""

# glibc gives large blocks back to the kernel after every batch; keeping them saves a quarter of a CNN's CPU time.
# One thread each: two one-thread workers are faster than two threads in one, and the bits depend on the threads.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "4294967296",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_NUM_THREADS": "1",
}
