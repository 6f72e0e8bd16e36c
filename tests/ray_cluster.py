"""A Ray cluster of this one machine, for tests: prints its address, and ends with its standard
input. What it writes stands in the folder that is named, whose path Ray wants short.
"""

import logging
import sys

import ray

if __name__ == "__main__":
    context = ray.init(
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _node_ip_address="127.0.0.1",
        _temp_dir=sys.argv[1],
    )
    print(context.address_info["gcs_address"], flush=True)
    sys.stdin.read()
    ray.shutdown()
