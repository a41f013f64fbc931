"""The compile report: what it reads out of the compilers' words, and, where they are installed, one kernel of each kind."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import deviceless
from benchmarks.gpu.deviceless import Launch
from benchmarks.gpu.targets import TARGETS

ROOT = Path(__file__).parents[2]

THUNKS = """001: kCustomKernel [source       | next=002 (1)] loop_add_fusion grid: [1, 1, 1] threads: [32, 1, 1]  shared_memory: 0 bytes
002: kCopy         [prev=001 (1) | next=003 (1)] kCopy
003: kWhile        [prev=002 (1) | sink        ]
condition:
    004: kCustomKernel [source | sink] paged_decode grid: [98, 8, 1] threads: [128, 1, 1]  shared_memory: 39168 bytes
"""
BUFFERS = """BufferAssignment:
allocation 0: size 512, page 0, parameter 0, shape |f32[128]| at ShapeIndex {}:
 value: <1 a @0> (size=512,offset=0): f32[128]{0}
allocation 1: size 768, page 0, preallocated-temp:
 value: <2 b @0> (size=256,offset=0): f32[64]{0}
 value: <3 c @0> (size=512,offset=256): f32[128]{0}
"""


def test_launches_and_temporaries():
    assert deviceless._launches(THUNKS) == [
        Launch("loop_add_fusion", (1, 1, 1), 0),
        Launch("kCopy"),
        Launch("kWhile"),
        Launch("paged_decode", (98, 8, 1), 39168),
    ]
    assert deviceless._temporaries(BUFFERS) == [256, 512]


WORDS = """ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to no reason in the function 'slow' in line 7
ptxas info    : Compiling entry function 'slow' for 'sm_90a'
ptxas info    : Function properties for slow
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 156 registers, used 1 barriers
"""
CODE = """
        /*0000*/                   S2R R0, SR_CTAID.X ;
.L_x_1:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R0], desc[UR18][R6.64], !P0 ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], RZ, !UPT, gsb0 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
        /*0040*/                   MUFU.EX2 R4, R5 ;
.L_x_2:
        /*0050*/               @P0 BRA `(.L_x_1) ;
.L_x_3:
        /*0060*/                   FADD R0, R0, R1 ;
        /*0070*/               @P0 BRA `(.L_x_3) ;
.L_x_4:
        /*0080*/                   BRA `(.L_x_4);
"""


def test_spills_and_serialised_instructions(tmp_path):
    (tmp_path / "words").write_text(WORDS)
    (tmp_path / "cubin").write_bytes(b"")
    [(name, kernel)] = deviceless._kernels(tmp_path, ())
    assert (name, kernel.registers, kernel.spill_bytes, kernel.stack_bytes) == ("slow", 156, 12, 16)
    assert kernel.spills
    assert kernel.serialized == "no reason"


def test_the_loop_that_does_the_work():
    opcodes, loop = deviceless._instructions(CODE)
    assert opcodes.total() == 9
    assert loop == {"LDGSTS": 1, "HGMMA": 1, "BRA": 2, "MUFU": 1}


def test_architectures():
    assert list(TARGETS) == ["sm_80", "sm_90a", "sm_100a"]
    assert "major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES" in TARGETS["sm_90a"].config()


def test_the_command_says_what_it_lacks_or_passes():
    """In a process of its own: here JAX may have started without the plugin."""
    command = [sys.executable, "-m", "benchmarks.gpu.compile_report", "--case", "copy bf", "--target", "sm_90a"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=300)
    if deviceless.missing():
        assert done.returncode == 2
        assert "install the dependency group gpu-compile" in done.stderr
        pytest.skip("the compilers are not installed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "block_copy" in done.stdout
