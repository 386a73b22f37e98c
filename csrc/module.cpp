// negfast._core: the parts of negfast that run outside Python.
#include <nanobind/nanobind.h>

NB_MODULE(_core, m) {
  m.doc() = "negfast's C++ core: shards, trie, packer";
}
