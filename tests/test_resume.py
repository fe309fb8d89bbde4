import json
import os
import shutil
import signal
from dataclasses import replace as changed

import pytest
import torch
from test_training import assert_same_state, lines_of, llama, make, one_thread, short_text

from mpsae.activations import BufferConfig, TextConfig
from mpsae.activations import replace as replaced
from mpsae.training import loop, state, train

__all__ = ["llama", "make", "one_thread", "short_text"]  # fixtures
