"""Knowledge distillation for image classifiers: `kd.load("runs/x")` gives a trained network back.

In a notebook, `kd.runs("runs/")` gives the runs below a folder, `kd.results("runs/x/report")` what was measured of
them, and `kd.plots` draws both.
"""

__version__ = "0.1.0"


def load(run, device="cpu", trust=False):
    """Load the network of a finished run, ready for images.

    Args:
        run: the run's folder (holds `config.json` and `model.safetensors`).
        device: where the network is put.
        trust: whether to run code that the folder names: the import path of a network that is not one of ours or of
            torchvision. Only True if you know whose code it is.

    Returns:
        A `kd.models.Classifier` in eval mode: call it on uint8 images (B, C, H, W) for logits (B, K), or call its
        `predict` on files or PIL images for class names and probabilities.

    Raises:
        kd.util.errors.UserError: the folder is missing, unfinished or damaged, or names code that is not trusted.
    """
    from kd.models import load_classifier  # torchvision is slow to import; `import kd` is not

    return load_classifier(run, device, trust)


def runs(folder):
    """The runs in a folder and below it, finished or not.

    Returns:
        A list of `kd.measure.records.Record`, which also has `frame()` and `curves()`, pandas DataFrames of one row
        per run and of one row per logged number. `kd.plots` draws them.

    Raises:
        kd.util.errors.UserError: there is no such folder.
    """
    from kd.measure.records import find_runs

    return find_runs(folder)


def results(path):
    """What `evaluate.py` measured: `runs` and `groups`, from the folder of `--report` or the file of `--json`.

    Raises:
        kd.util.errors.UserError: it is not there, or holds something else.
    """
    from kd.measure.records import read_results

    return read_results(path)


def __getattr__(name):
    if name == "plots":  # matplotlib is slow to import; `import kd` is not
        import importlib

        return importlib.import_module("kd.report.plots")
    raise AttributeError(f"module 'kd' has no attribute {name!r}")
