import os

collect_ignore = [] if "FAKE_CUDA" in os.environ else ["traced"]  # test_fake_cuda.py runs the folder in its own process
