// The decoding loops with BMI2, whose shifts and bit-field extraction are single instructions; this file
// alone is compiled for it (CMakeLists.txt) and decode.cpp calls it only where the processor has it.
#define NEGFAST_ISA bmi2
#include "decode_loops.inc"
