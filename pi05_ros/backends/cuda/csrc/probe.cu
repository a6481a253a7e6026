// Asks how many clusters of blocks with a given use of shared memory the GPU runs at once; never launched.
extern "C" __global__ void probe() {}
