// What dev/test/test_mpi.py tries with the emulator's NCCL, in two processes: `test_nccl right`, and what must fail

#include <cuda_runtime.h>
#include <nccl.h>

constexpr size_t N = 10;

__global__ void fill(float* x, int value) { x[threadIdx.x] = value; }

int main(int argc, char** argv) {
    MPI_Init(&argc, &argv);
    const std::string what = argv[argc - 1];
    int rank;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    const int other = 1 - rank;
    float *own, *all, host[2 * N];
    cudaStream_t first, second;
    cudaSetDevice(rank);
    cudaMalloc(&own, N * sizeof(float));
    cudaMalloc(&all, 2 * N * sizeof(float));
    cudaStreamCreate(&first);
    cudaStreamCreate(&second);
    ncclUniqueId id;
    ncclComm_t comm = nullptr;
    if (rank == 0) ncclGetUniqueId(&id);
    if (what != "another id") MPI_Bcast(&id, sizeof id, MPI_BYTE, 0, MPI_COMM_WORLD);
    if (what != "no communicator") ncclCommInitRank(&comm, 2, id, rank);

    fill<<<1, N, 0, first>>>(own, rank + 1);
    if (what == "end without start") ncclGroupEnd();
    ncclGroupStart();
    ncclSend(what == "host memory" ? host : own, N - (what == "fewer sent"), ncclFloat, other, comm, first);
    ncclRecv(all, N - (what == "more sent"), ncclFloat, other, comm, what == "two streams" ? second : first);
    if (what != "group not ended") ncclGroupEnd();
    cudaMemcpyAsync(host, all, N * sizeof(float), cudaMemcpyDeviceToHost, first);
    cudaStreamSynchronize(first);
    bool right = host[0] == other + 1 && host[N - 1] == other + 1;

    // The second gather is on another stream. Yet it comes after the first, in both processes.
    ncclAllGather(own, all, N, ncclFloat, comm, first);
    ncclAllGather(all + rank * N, all, N, ncclFloat, comm, second);
    cudaMemcpyAsync(host, all, 2 * N * sizeof(float), cudaMemcpyDeviceToHost, second);
    cudaStreamSynchronize(second);
    for (size_t i = 0; i < 2 * N; i++) right = right && host[i] == i / N + 1;
    MPI_Finalize();
    return !right;
}
