import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # for what test modules share

import triton_interpreter

triton_interpreter.repair()
