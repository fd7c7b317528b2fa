"""Tests."""

import os

# Reports are compared byte for byte: without this, they say when and where a run was made. It must
# be there before any module takes a copy of the environment for processes that it starts.
os.environ.setdefault("SOURCE_DATE_EPOCH", "0")
