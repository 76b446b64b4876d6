"""Who this process is, from flags and from variables."""

import os

import pytest
from jax._src.clusters import cloud_tpu_cluster

from tinymim_jax.runtime.cluster import Cluster, find, given, number
from tinymim_jax.runtime.errors import InputError

SLURM = {
    "SLURM_JOB_ID": "5000", "SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "node[007-008]", "SLURM_STEP_NUM_NODES": "4",
}  # fmt: skip
ON_ONE_NODE = {**SLURM, "SLURM_LOCALID": "3", "SLURM_STEP_NODELIST": "node007", "SLURM_STEP_NUM_NODES": "1"}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}  # fmt: skip
PORT = 61440 + 5000 % 4096  # as JAX chooses it
EMPTY = dict.fromkeys(("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"), "")


@pytest.fixture
def environment(monkeypatch):
    """environment(variables): what a launcher sets, and nothing else of that kind."""

    def arrange(variables):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_", "CUDA_VISIBLE")):
                monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return arrange


@pytest.mark.parametrize(
    ("env", "cluster"),
    [
        ({}, None),
        (EMPTY, None),
        ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4"}, None),  # in sbatch, not in a step
        (SLURM, Cluster(f"node007:{PORT}", 4, 3)),  # a process a node: all its GPUs
        (ON_ONE_NODE, Cluster(f"node007:{PORT}", 4, 3, (3,))),  # srun -n4 --gres=gpu:4
        ({**ON_ONE_NODE, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, Cluster(f"node007:{PORT}", 4, 3, (3,))),
        ({**ON_ONE_NODE, "CUDA_VISIBLE_DEVICES": "3"}, Cluster(f"node007:{PORT}", 4, 3)),  # --gpus-per-task=1
        ({**SLURM, "JAX_COORDINATOR_ADDRESS": "head:99"}, Cluster("head:99", 4, 3)),
        ({**SLURM, "JAX_COORDINATOR_PORT": "99"}, Cluster("node007:99", 4, 3)),
        ({**OPEN_MPI, "JAX_COORDINATOR_ADDRESS": "h:1"}, Cluster("h:1", 2, 1)),
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:5"},
            Cluster("10.0.0.1:61441", 2, 1, (1,)),
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "pod-0:1", "JAX_NUM_PROCESSES": "8", "JOB_COMPLETION_INDEX": "7"},
            Cluster("pod-0:1", 8, 7),
        ),
    ],
)
def test_what_launchers_say(env, cluster, environment):
    environment(env)
    assert find() == cluster


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_PROCESS_ID": "1"}, "num_processes is missing"),
        (OPEN_MPI, "coordinator is missing"),  # version 5
    ],
)
def test_launchers_that_say_a_part(env, message, environment):
    environment(env)
    with pytest.raises(InputError, match=message):
        find()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((None, 2, 0), "coordinator is missing; give --coordinator=HOST:PORT"),
        (("h:1", 2, None), "process_id is missing"),
        (("h:1", 2, 2), "process_id 2 is not among 2 processes"),
        (("h:1", "x", 0), "must be numbers"),
        (("h", 2, 0), "coordinator 'h' is not HOST:PORT"),
        (("h:99999", 2, 0), "coordinator 'h:99999' is not HOST:PORT, with a port from 1 to 65535"),
        (("h:0", 2, 0), "with a port from 1 to 65535"),
    ],
)
def test_a_cluster_described_in_part(parts, message):
    with pytest.raises(InputError, match=message):
        given(*parts)


SLICE = {
    "TPU_WORKER_HOSTNAMES": "t0,t1", "TPU_WORKER_ID": "1", "MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1",
    "MEGASCALE_COORDINATOR_ADDRESS": "s0-t0:8080",
}  # fmt: skip
METADATA = {"agent-worker-number": "1", "worker-network-endpoints": "10.0.0.5,10.0.0.6", "tpu-env": "TYPE: 'V4'"}


@pytest.fixture
def tpu_vm(monkeypatch, environment):
    """tpu_vm(variables, metadata): a machine with TPUs whose metadata server says so."""

    def arrange(variables, metadata=None):
        environment(variables)
        monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
        said = metadata or {}
        monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", lambda key: (said.get(key, ""), 200 if said else 404))

    return arrange


@pytest.mark.parametrize(
    ("env", "metadata", "cluster"),
    [
        (SLICE, None, Cluster("s0-t0:8482", 4, 3)),
        ({**SLICE, "JAX_COORDINATOR_PORT": "77"}, None, Cluster("s0-t0:77", 4, 3)),
        ({}, METADATA, Cluster("10.0.0.5:8482", 2, 1)),
        ({"JAX_PLATFORMS": "cpu"}, METADATA, None),
        ({}, {**METADATA, "agent-worker-number": "0", "worker-network-endpoints": "10.0.0.5"}, None),
        ({}, None, None),
    ],
)
def test_tpu_pods(env, metadata, cluster, tpu_vm):
    tpu_vm(env, metadata)
    assert find() == cluster


def test_a_tpu_whose_metadata_server_does_not_answer(tpu_vm, monkeypatch):
    tpu_vm({})

    def refused(_):
        raise ConnectionError("refused")

    monkeypatch.setattr(cloud_tpu_cluster, "get_metadata", refused)
    with pytest.raises(InputError, match=r"nothing says which workers belong together \(refused\); .*TPU_SKIP_MDS"):
        find()


@pytest.mark.parametrize("name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_what_a_launcher_left_empty_is_one_and_what_is_no_number_is_refused(name, monkeypatch):
    assert number({}, name) == number({name: ""}, name) == 1
    assert number({name: "4"}, name) == 4
    for variable in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "4(x2)")
    with pytest.raises(InputError, match=rf"^{name}=4\(x2\) is no number; "):
        find()
