"""From a data set's own files to batches on a device."""
