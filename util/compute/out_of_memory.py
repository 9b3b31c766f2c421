"""Recognition of allocations that failed."""

import re

import torch

# Out-of-memory messages of the libraries under PyTorch, in errors that are not OutOfMemoryError.
OUT_OF_MEMORY = (
    "out of memory",  # CUDA itself, NCCL, MPS
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate",  # no room for its workspace
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9
    "DefaultCPUAllocator",  # a CPU
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed on a GPU, in one of its libraries, or on a CPU.

    Errors of loader processes do not count: a smaller batch would not help them.
    """
    if "DataLoader worker" in str(error):
        return False
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


def out_of_memory_message(error: BaseException, advice: str) -> str:
    """Message for the user, with the requested size if the error names one.

    Args:
        error: see `is_out_of_memory`.
        advice: what to change.
    """
    size = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
    requested = f" ({size[0][0].lower() + size[0][1:]})" if size else ""
    return f"the device ran out of memory{requested}: {advice}"
