"""The commands train.py, convert_torch_weights.py, sample.py and evaluate.py, also as they are
installed: d2m-train and so on."""
