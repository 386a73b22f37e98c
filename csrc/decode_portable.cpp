// The decoding loops for any 64-bit processor.
#define NEGFAST_ISA portable
#include "decode_loops.inc"
