"""A finished run as a file that other programs take: ONNX, a torch.export program, weights alone, a folder for the Hub.

`python -m kd.export` is the command; every export is loaded again and compared with PyTorch before it is kept.
"""
