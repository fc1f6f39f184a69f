"""Files: uploading a job's inputs and downloading its outputs."""
