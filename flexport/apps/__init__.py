"""What people use an engine for: each module is one whole job."""
