"""What went wrong on the GPU, by name, and what may still work afterwards."""

from __future__ import annotations

import torch

from pi05_ros.errors import WorkerError

OUT_OF_MEMORY, CUDA_ERROR = "CUDA out of memory", "CUDA error"  # `cause` of the errors made here


def named(error: Exception) -> Exception:
    """A GPU's failure as a WorkerError of one of the causes above, with the notes it had; any other error as it is.

    Called on the thread that makes the CUDA calls: it tries whether the context still answers.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "CUDA error: out of memory" in text:
        made = WorkerError("GPU memory", expected="enough for the model and a chunk", received=_first_line(text),
                           way_out="Close other programs on the GPU, then clean up and configure again.",
                           cause=OUT_OF_MEMORY)
    elif isinstance(error, RuntimeError) and any(word in text for word in ("CUDA", "CUBLAS", "cuBLAS", "CUDNN")):
        way_out = ("The CUDA context of this process is lost: restart the process." if context_lost()
                   else "Clean up and configure again.")
        made = WorkerError("GPU", expected="to compute", received=_first_line(text), way_out=way_out, cause=CUDA_ERROR)
    else:
        return error
    for note in getattr(error, "__notes__", []):
        made.add_note(note)
    return made


def context_lost() -> bool:
    """After some errors (an illegal address, say) every later CUDA call of the process fails."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0].rstrip(".") if text.strip() else "no explanation"
