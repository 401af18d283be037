"""Devices by name; and the first result of a process is that of every later one."""

import subprocess
import sys

import pytest
import torch

from locft.errors import InputError
from locft.process import settle_vector_math, torch_device
from tests.tiny import tiny_loaded

FIRST_AND_SECOND = """
import torch
from locft.process import VECTOR_FUNCTIONS, settle_vector_math
settle_vector_math()
torch.set_num_threads(2)
numbers = torch.rand(52, 64, generator=torch.Generator().manual_seed(0)) * 0.9
first = [function(numbers) for function in VECTOR_FUNCTIONS]
print(all(torch.equal(one, function(numbers)) for one, function in zip(first, VECTOR_FUNCTIONS)))
"""


def test_every_loaded_model_has_the_kernels_chosen_before_it_runs():
    tiny_loaded("llama")
    assert settle_vector_math.cache_info().currsize == 1


def test_first_and_second_results_are_the_same_in_fresh_processes():
    running = [
        subprocess.Popen([sys.executable, "-c", FIRST_AND_SECOND], stdout=subprocess.PIPE, text=True) for _ in range(3)
    ]
    assert [process.communicate()[0].strip() for process in running] == ["True"] * 3


def test_devices():
    assert torch_device("cpu") == torch.device("cpu")
    assert torch_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    absent = "cuda:99" if torch.cuda.is_available() else "cuda"
    with pytest.raises(InputError, match=f"device '{absent}': torch cannot use it here"):
        torch_device(absent)
    with pytest.raises(InputError, match="expected auto, cpu, cuda or cuda:N"):
        torch_device("gpu")
