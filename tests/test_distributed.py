import concurrent.futures
import contextlib
import json
import socket
import sys
import time

import jax
import pytest

from tinymim_jax import distributed
from tinymim_jax.config import InputError
from tinymim_jax.distributed import Cluster, find, given, roll_call


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def call(facts, count=None, timeout=20.0, absent=()):
    """The verdict that each of the processes hears: "" or an error."""
    address, count = f"127.0.0.1:{free_port()}", count or len(facts)

    def one(i):
        try:
            roll_call(Cluster(address, count, i), facts[i], timeout)
        except InputError as error:
            return str(error)
        return ""

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(one, [i for i in range(len(facts)) if i not in absent]))


def test_all_are_there_and_agree():
    assert call([{"jax": "0.10", "config": {"lr": 1}}] * 5) == [""] * 5


def test_the_missing_are_named_to_everyone():
    began = time.monotonic()
    verdicts = call([{}] * 4, timeout=1.5, absent=(1, 3))
    assert set(verdicts) == {
        "processes 1, 3 of 4 did not come within 1.5 s; see their logs, or raise --start_timeout if they are slow to start"
    }
    assert len(verdicts) == 2 and time.monotonic() - began < 10


def test_without_process_0():
    (verdict,) = call([{}] * 2, timeout=1.0, absent=(0,))
    assert verdict.startswith("process 1 did not reach process 0 at 127.0.0.1:") and "within 1 s" in verdict


@pytest.mark.parametrize(
    ("other", "what"),
    [
        ({"jax": "0.11", "config": {"lr": 1}}, 'jax: "0.10" -> "0.11"'),
        ({"jax": "0.10", "config": {"lr": 2}}, "config.lr: 1 -> 2"),
        ({"jax": "0.10"}, 'config: {"lr": 1} -> null'),
    ],
)
def test_a_difference_is_told_to_everyone(other, what):
    facts = [{"jax": "0.10", "config": {"lr": 1}}] * 3
    facts[2] = other
    for verdict in call(facts):
        assert verdict.startswith(f"process 2 ({socket.gethostname()}) differs from process 0 in {what};")


def test_a_stranger_at_the_port_does_no_harm():
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        clusters = [Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)]
        first = pool.submit(roll_call, clusters[0], {}, 20)
        for junk in (b"GET / HTTP/1.1\r\n\r\n", b"\n", b"[1]\n", b'{"process": null}\n'):
            for _ in range(100):
                try:
                    with socket.create_connection(("127.0.0.1", port), 1) as stranger:
                        stranger.sendall(junk)
                    break
                except OSError:
                    time.sleep(0.02)
        pool.submit(roll_call, clusters[1], {}, 20).result(20)
        first.result(20)


def test_a_stranger_who_says_nothing_holds_nobody_up(monkeypatch):
    monkeypatch.setattr(distributed, "PATIENCE", 0.2)
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as strangers:
        clusters = [Cluster(f"127.0.0.1:{port}", 2, i) for i in range(2)]
        first = pool.submit(roll_call, clusters[0], {}, 10)
        for _ in range(100):
            with contextlib.suppress(OSError):
                strangers.enter_context(socket.create_connection(("127.0.0.1", port), 1))
                break
            time.sleep(0.02)
        pool.submit(roll_call, clusters[1], {}, 10).result(20)
        first.result(20)


def test_a_port_in_use():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(
            InputError, match=f"process 0 cannot listen on port {port} .*; choose another --coordinator"
        ):
            roll_call(Cluster(f"127.0.0.1:{port}", 2, 0), {}, 1)


def test_own_facts_are_versions_code_and_what_is_given():
    facts = distributed.own_facts(config={"a": 1})
    assert facts["jax"] == jax.__version__ and len(facts["code"]) == 12 and facts["config"] == {"a": 1}
    assert facts["Python"] == f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert json.loads(json.dumps(facts)) == facts


SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[007-008]",
}  # fmt: skip


@pytest.mark.parametrize(
    ("env", "cluster"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # in sbatch, not in a step
        (SLURM, Cluster("node007:62344", 4, 3)),
        ({**SLURM, "SLURM_STEP_NODELIST": "a1,b2"}, Cluster("a1:62344", 4, 3)),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "0,1"}, Cluster("node007:62344", 4, 3, (1,))),
        ({**SLURM, "SLURM_NTASKS_PER_NODE": "2", "CUDA_VISIBLE_DEVICES": "1"}, Cluster("node007:62344", 4, 3)),
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "head:99"}, Cluster("head:99", 4, 3)),
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "JAX_COORDINATOR_ADDRESS": "h:1"},
            Cluster("h:1", 2, 1),
        ),
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, Cluster("t0:8476", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}, None),
        (
            {"JAX_COORDINATOR_ADDRESS": "pod-0:1", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "7"},
            Cluster("pod-0:1", 8, 7),
        ),
    ],
)
def test_what_launchers_say(env, cluster):
    assert find(env) == cluster


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((None, 2, 0), "coordinator is missing; give --coordinator=HOST:PORT"),
        (("h:1", 2, None), "process_id is missing"),
        (("h:1", 2, 2), "process_id 2 is not among 2 processes"),
        (("h:1", "x", 0), "must be numbers"),
        (("h", 2, 0), "coordinator 'h' is not HOST:PORT"),
    ],
)
def test_a_cluster_described_in_part(parts, message):
    with pytest.raises(InputError, match=message):
        given(*parts)
