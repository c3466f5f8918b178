// One transformer layer over a batch, as phases; and the two ends of a model, embedding and head.
//
// Each line of RunLayer is a phase (two, if the batch has many rows): its pieces are panels of
// weights or tasks of attention, shared out by the pool, and a barrier ends it. A row's bits depend
// on its own session only. Everything returns false as soon as a value was not finite; the step's
// Failure then names the row, and the step is to be given up.
#pragma once

#include <cstddef>
#include <cstdint>

#include "engine/rope.h"
#include "engine/step.h"
#include "engine/weights.h"

namespace potluck {

// Buffers for n_rows rows, of which n_wanted want logits. Allocates only beyond the largest so far.
void ReserveScratch(Step& step, size_t n_rows, size_t n_wanted);
size_t ScratchBytes(const Scratch& scratch);

// The angles of every row's position, once for all layers of the step.
void TurnAngles(Step& step, const Rope& rope);

// scratch.x = rows of the embedding; tokens [n_rows], each below its rows.
void Embed(Step& step, const Matrix& embedding, const int32_t* tokens);

// scratch.x through one layer; index counts in the span.
bool RunLayer(Step& step, const LayerWeights& layer, size_t index);

// logits [n_rows, vocab] of the hidden states wanted [n_rows, dim] in scratch.wanted.
bool RunHead(Step& step, const SpanWeights& span, size_t n_rows, float* logits);

}  // namespace potluck
