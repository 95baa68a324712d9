"""Knowledge distillation for image classifiers: `kd.load("runs/x")` gives a trained network back."""

__version__ = "0.1.0"


def load(run, device="cpu"):
    """Load the network of a finished run, ready for images.

    Args:
        run: the run's folder (holds `config.json` and `model.safetensors`).
        device: where the network is put.

    Returns:
        A `kd.models.Classifier` in eval mode: call it on uint8 images (B, C, H, W) for logits (B, K), or call its
        `predict` on files or PIL images for class names and probabilities.

    Raises:
        kd.errors.UserError: the folder is missing, unfinished or damaged.
    """
    from kd.models import load_classifier  # torchvision is slow to import; `import kd` is not

    return load_classifier(run, device)
