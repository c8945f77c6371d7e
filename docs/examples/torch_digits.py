"""Train on handwritten digits with PyTorch, in batches of two neighbouring digits each: 0 and 1, or 2 and 3, …

A batch's own statistics tell which digits are in it, and the running ones do not. So a network that was trained with
the former fails with the latter. Batch renormalization trains with the running statistics; one line makes it.

Needs: nbbn, PyTorch and scikit-learn
"""

import functools

import torch
from sklearn.datasets import load_digits
from torch import nn

import nbbn.torch

STEPS, HIDDEN = 1000, 64


class Clips:
    """The bounds of renorm's corrections: none at first, as batch normalization has it, and then looser and looser."""

    progress = 0.0

    def ramp(self, start, end, until):
        return start + (end - start) * min(max((self.progress - 0.04) / (until - 0.04), 0.0), 1.0)

    def rmax(self):
        return self.ramp(1.0, 3.0, until=0.3)

    def rmin(self):
        return 1 / self.rmax()

    def dmax(self):
        return self.ramp(0.0, 5.0, until=0.2)


def network(norm):
    return nn.Sequential(
        *(nn.Linear(64, HIDDEN, bias=False), norm(HIDDEN), nn.ReLU()),
        *(nn.Linear(HIDDEN, HIDDEN, bias=False), norm(HIDDEN), nn.ReLU()),
        nn.Linear(HIDDEN, 10),
    )


def train(norm, clips, images, labels):
    torch.manual_seed(0)
    net = network(norm)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)  # or the last few pairs decide
    of_digit = [torch.where(labels == digit)[0] for digit in range(10)]
    for step in range(STEPS):
        clips.progress = step / STEPS
        first = 2 * int(torch.randint(5, ()))
        batch = torch.cat([of_digit[d][torch.randint(len(of_digit[d]), (16,))] for d in (first, first + 1)])
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
        optimizer.step()
        decay.step()
    return net.eval()


def main():
    torch.set_num_threads(1)  # for matrices as small as these, threads would only wait for each other
    images, labels = (torch.from_numpy(a) for a in load_digits(return_X_y=True))
    images = (images.float() - 5) / 6
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    training, test = order[800:], order[:800]
    clips = Clips()
    bounds = {"rmax": clips.rmax, "rmin": clips.rmin, "dmax": clips.dmax}
    norms = {
        "torch.nn.BatchNorm1d": functools.partial(nn.BatchNorm1d, momentum=0.01),
        "nbbn.torch.BatchNorm1d": functools.partial(
            nbbn.torch.BatchNorm1d, momentum=0.01, renorm=True, renorm_clipping=bounds
        ),
    }
    accuracies = {}
    for name, norm in norms.items():
        net = train(norm, clips, images[training], labels[training])
        with torch.no_grad():
            accuracies[name] = float((net(images[test]).argmax(1) == labels[test]).float().mean())
        print(f"{name:24} {accuracies[name]:.1%} of the test images")
    return accuracies


if __name__ == "__main__":
    main()
