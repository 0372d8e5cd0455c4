"""Captioned images where people keep them: tars, folders, parquet, ArrayRecord, on disk or in an
object store."""
