"""Runs in a virtual environment of its own, with tritonclient and without this project: one picture, one JSON line.

python tests/fakes/triton_probe.py ADDRESS MODEL PIXELS.npy LATENT.npy
"""

import json
import sys

import numpy as np
import tritonclient.grpc as triton

address, model, pixels, latent = sys.argv[1:]
client = triton.InferenceServerClient(address)
found = {
    "live": client.is_server_live(), "ready": client.is_server_ready(), "model_ready": client.is_model_ready(model),
    "unknown_ready": client.is_model_ready("no-such-model"), "inputs": [i.name for i in client.get_model_metadata(model).inputs],
}  # fmt: skip
for name, datatype, path in (("image", "UINT8", pixels), ("latent_0", "FP32", latent)):
    array = np.load(path)
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    wanted = [triton.InferRequestedOutput("class_ids"), triton.InferRequestedOutput("scores")]
    answer = client.infer(model, [tensor], outputs=wanted)
    found[name] = {"class_ids": answer.as_numpy("class_ids").tolist(), "scores": answer.as_numpy("scores").tolist()}
try:
    tensor = triton.InferInput("image", [1, 2, 2, 3], "UINT8")
    tensor.set_data_from_numpy(np.zeros((1, 2, 2, 3), np.uint8))
    client.infer(model, [tensor])
except triton.InferenceServerException as error:
    found["wrong_shape"] = error.status()
sys.stdout.write(json.dumps(found) + "\n")
