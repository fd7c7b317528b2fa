"""Uploading a finished checkpoint to the hub, with a model card.

What is uploaded is what the run wrote, by its report's list, and nothing else that lies there; the
report without the names of folders. The checkpoint here is not changed by it, whether it succeeds
or not.
"""

from quantize.push.checkpoint import Finished, finished
from quantize.push.upload import push, reserve

__all__ = ["Finished", "finished", "push", "reserve"]
