"""Data sets, their readers, the steps that map a record to a training sample, and the data loaders."""
