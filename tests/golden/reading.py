"Reads a golden of the released UniDistill code: inputs, expected numbers and what a float32 result may miss them by."
import json
from pathlib import Path

import numpy as np
import torch
from golden.det import det, detu

HERE = Path(__file__).resolve().parent


def made(kind, key, shape, a=None, b=None, post=None):
    "An input that is not stored, from its key: `det` has scale a and shift b, `detu` lies in a..b."
    if kind == "det": x = det(key, shape, 1. if a is None else a, b or 0.)
    else: x = detu(key, shape, 0. if a is None else a, 1. if b is None else b)
    return x.relu() if post == "relu" else x


class Golden:
    "One file: `inputs` are tensors, and `close` compares."

    def __init__(self, name: str):
        z = np.load(HERE/f"{name}.npz")
        spec = json.loads(str(z["spec"]))
        self.inputs = {k: made(*v) for k, v in spec["inputs"].items()}
        self.inputs |= {k[3:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("in_")}
        self.expected = {k: z[k] for k in z.files if k != "spec" and not k.startswith("in_")}
        self.allowed = spec["tol"]

    def __getitem__(self, name: str) -> torch.Tensor: return self.inputs[name]

    def close(self, name: str, value):
        "Raise unless `value` is the expected one to the tolerance of the file."
        wanted, value = self.expected[name], np.asarray(value.detach() if isinstance(value, torch.Tensor) else value)
        assert value.shape == wanted.shape, f"{name}: {value.shape}, expected {wanted.shape}"
        atol, rtol = self.allowed[name]
        np.testing.assert_allclose(value, wanted, rtol, atol, err_msg=name)
