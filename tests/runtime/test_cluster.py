"""Who this process is, from flags, variables, and a metadata server on this machine."""

import contextlib
import functools
import http.server
import re
import threading

import pytest

from tests.processes import free_port
from tests.test_roll_call import at_once
from tinymim_jax.runtime import cluster
from tinymim_jax.runtime.cluster import Cluster, find, given
from tinymim_jax.runtime.errors import InputError
from tinymim_jax.runtime.rendezvous import roll_call

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
        ({"TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1"}, Cluster("t0:8482", 2, 1)),
        ({"TPU_WORKER_HOSTNAMES": "t0", "TPU_WORKER_ID": "0"}, None),
        (
            {
                "TPU_WORKER_HOSTNAMES": "t0,t1",
                "TPU_WORKER_ID": "1",
                "MEGASCALE_NUM_SLICES": "2",
                "MEGASCALE_SLICE_ID": "1",
                "MEGASCALE_COORDINATOR_ADDRESS": "s0-t0:8080",
            },
            Cluster("s0-t0:8482", 4, 3),
        ),
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
        (("h:99999", 2, 0), "coordinator 'h:99999': a port is a number from 1 to 65535"),
        (("h:0", 2, 0), "a port is a number from 1 to 65535"),
    ],
)
def test_a_cluster_described_in_part(parts, message):
    with pytest.raises(InputError, match=message):
        given(*parts)


def test_a_process_with_a_number_but_without_a_count():
    with pytest.raises(InputError, match="num_processes is missing"):
        find({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "1"})


class Metadata(http.server.BaseHTTPRequestHandler):
    """What a TPU VM's metadata server says, to those who ask as it demands."""

    def __init__(self, says, *args):
        self.says = says
        super().__init__(*args)

    def do_GET(self):
        key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        is_known = key in self.says and self.headers["Metadata-Flavor"] == "Google"
        self.send_response(200 if is_known else 404)
        self.end_headers()
        self.wfile.write(self.says[key].encode() if is_known else b"no such thing")

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def metadata(says):
    """The variables of a process on a TPU VM whose metadata server says so."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Metadata, says))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    server.shutdown()
    server.server_close()


@pytest.fixture
def tpu_machine(monkeypatch, tmp_path):
    (tmp_path / "accel0").touch()
    monkeypatch.setattr(cluster, "TPU_DEVICES", (str(tmp_path / "accel0"),))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # not for the metadata server
    monkeypatch.setattr(cluster, "ATTEMPTS", 1)


SLICE = {
    "worker-network-endpoints": "10.0.0.5,10.0.0.6",
    "tpu-env": "TYPE: 'V4'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    "MEGASCALE_COORDINATOR_ADDRESS: '10.0.0.1:8080'\n",
}


@pytest.mark.parametrize(
    ("says", "more", "found"),
    [
        ({"worker-network-endpoints": "10.0.0.5,10.0.0.6"}, {}, Cluster("10.0.0.5:8482", 2, 1)),
        ({"worker-network-endpoints": "unknown:unknown:10.0.0.5,unknown:unknown:10.0.0.6"}, {},
         Cluster("10.0.0.5:8482", 2, 1)),
        (SLICE, {}, Cluster("10.0.0.1:8482", 4, 3)),
        (SLICE, {"JAX_COORDINATOR_PORT": "77", "MEGASCALE_SLICE_ID": "0"}, Cluster("10.0.0.1:77", 4, 1)),
        (SLICE, {"TPU_SKIP_MDS_QUERY": "1"}, None),
        (SLICE, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
        ({"worker-network-endpoints": "10.0.0.5"}, {}, None),
    ],
)  # fmt: skip
def test_a_tpu_vm_asks_its_metadata_server(tpu_machine, says, more, found):
    with metadata({"agent-worker-number": "1", **says}) as env:
        assert find({**env, **more}) == found


def test_a_machine_of_which_the_metadata_server_says_nothing_is_on_its_own(tpu_machine):
    with metadata({}) as env:
        assert find(env) is None


def test_no_metadata_server(tpu_machine):
    server = f"127.0.0.1:{free_port()}"
    with pytest.raises(InputError, match=rf"metadata server {re.escape(server)} does not say .*refused.*TPU_SKIP_MDS"):
        find({"GCE_METADATA_IP": server})


def test_tpu_vms_call_the_roll(tpu_machine):
    own, facts = [], [{"config": {"lr": 1}}, {"config": {"lr": 2}}]
    port = {"JAX_COORDINATOR_PORT": str(free_port())}
    for i in "01":
        with metadata({"worker-network-endpoints": "127.0.0.1,127.0.0.1", "agent-worker-number": i}) as env:
            own.append(find({**env, **port}))
    assert all("process 1 " in str(e) and "in config.lr: 1 -> 2" in str(e) for e in at_once(own, facts))
    with pytest.raises(InputError, match="process 1 of 2 did not come within 1 s"):
        roll_call(own[0], facts[0], 1)
