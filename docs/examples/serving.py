"""Serve a layer over HTTP: POST an array in NumPy's .npy format, get the normalized one. Standard library only."""

import io
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

import nbbn


def trained_layer():
    """Stands for yours: the config and the weights of a layer that was trained elsewhere."""
    config = {"axis": 1, "momentum": 0.9, "epsilon": 1e-5, "activation": "relu"}
    gamma, beta, mean, variance = np.ones(3), np.zeros(3), np.array([0.5, 0.4, 0.3]), np.full(3, 0.04)
    layer = nbbn.BatchNormalization.from_config(config)
    layer.build((None, 3, None, None))
    layer.set_weights([gamma, beta, mean, variance])
    return layer


def make_server(layer, port=0):
    """A server on this machine's own address; port 0 takes a free one."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                x = np.load(io.BytesIO(body), allow_pickle=False)
                status, result = 200, layer(x)  # inference: no lock, any number of threads
            except (TypeError, ValueError) as error:  # says which argument, what came and what is accepted
                status, result = 400, np.array(str(error))
            answer = io.BytesIO()
            np.save(answer, result, allow_pickle=False)
            self.send_response(status)
            self.send_header("Content-Length", str(len(answer.getvalue())))
            self.end_headers()
            self.wfile.write(answer.getvalue())

        def log_message(self, *args):
            pass

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


if __name__ == "__main__":
    layer = trained_layer()
    layer(np.zeros((1, 3, 224, 224), np.float32))  # compiles, or loads from the kernel cache, before the first request
    server = make_server(layer, int(sys.argv[1]) if len(sys.argv) > 1 else 8000)
    print("http://{}:{}".format(*server.server_address))
    server.serve_forever()
