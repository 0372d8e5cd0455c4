"""The paper's comparisons in miniature: tables of cells, each a short distillation run."""
