"""The model directory."""
