/* New rows of many users on what their earlier rows left: attention with SiLU, and domain states.
 *
 * A user's memory lies as a session keeps it, keys and values of rows in columns, so as many rows as
 * there are lanes are one vector. Rows put their own keys and values behind it, then a few of them at
 * a time walk over it. Biases and what a row sees are worked out on the way.
 */

#include "../vectors.h"

#include <math.h>

/* What a head reads: hstu_xd.model.views.Run. */
enum { EVERYTHING, OWN, TARGET };

/* A user's part of a step, eight bytes each; native.py has the same list. */
typedef struct {
    float *memory; /* (layers, heads, dqk + dv, capacity) */
    const int64_t *times, *domains; /* of the rows in memory and of the new ones */
    float *states; /* (layers, heads, num_states, dqk + dv), those of the new rows last */
    const uint8_t *hidden; /* (new rows, num_states) */
    const int64_t *state_times; /* of the states in memory */
    int64_t layer_stride, capacity, first, count, writers, is_virtual, row, num_states, states_in_memory;
} User;

/* What is known of a new row. */
typedef struct {
    int64_t domain, target, position, next_time;
} Row;

/* Fields of eight bytes each, pointers first; native.py has the same list. */
typedef struct {
    /* (rows, heads * width) floats, a stride apart: queries; keys and values, side by side. */
    const float *q, *own;
    const User *users;
    const Row *rows;
    const int64_t *runs;  /* (heads,) */
    const float *positions, *times; /* tables of the layer's bias, or NULL */
    const float *ages;    /* (heads, never_written + 1), or NULL */
    const int32_t *edges;
    float *out;           /* (rows, heads * dv) */
    int64_t q_stride, own_stride, layer, num_users, heads, dqk, dv, origin, never_written, threads;
} Step;

/* A user's columns in scratch memory, and a few rows on their way over them. */
typedef struct {
    const Step *s;
    const User *user;
    int64_t end, wide;      /* columns, and rounded up */
    int64_t first_row, rows; /* of ROWS at most */
    int64_t dqk, dv;        /* widths, rounded up */
    float *queries;         /* (ROWS, dqk) */
    float *weights, *bias;  /* (ROWS, wide); a bias of -inf: not seen */
    float *tail;            /* (dqk + dv, LANES), the last columns, filled up */
    float *columns, *values; /* (dqk, wide) and (wide, dv), of a head's states */
    float *totals;          /* (ROWS, dv) */
    int64_t *key_times;     /* (wide,) */
    int32_t *key_domains, *key_positions; /* (wide,) */
} Walk;

static const Row *row_of(const Walk *x, int64_t r) { return x->s->rows + x->user->row + x->first_row + r; }

static void take_queries(const Walk *x, int64_t head) {
    const Step *s = x->s;
    for (int64_t r = 0; r < ROWS; r++) {
        clear(x->queries + r * x->dqk, x->dqk);
        if (r < x->rows)
            copy(x->queries + r * x->dqk, s->q + (x->user->row + x->first_row + r) * s->q_stride + head * s->dqk, s->dqk);
    }
}

/* Puts the keys and values of a head's new rows behind those in memory; copies the last columns. */
static const float *put_rows(const Walk *x, int64_t head) {
    const Step *s = x->s;
    const User *user = x->user;
    const int64_t width = s->dqk + s->dv, full = x->end / LANES * LANES;
    float *columns = user->memory + s->layer * user->layer_stride + head * width * user->capacity;
    for (int64_t i = 0; i < user->count; i++) {
        const float *own = s->own + (user->row + i) * s->own_stride + head * width;
        for (int64_t c = 0; c < width; c++) columns[c * user->capacity + user->first + i] = own[c];
    }
    for (int64_t c = 0; c < width; c++) {
        clear(x->tail + c * LANES, LANES);
        memcpy(x->tail + c * LANES, columns + c * user->capacity + full, (x->end - full) * sizeof(float));
    }
    return columns;
}

static void describe_columns(const Walk *x) {
    const User *user = x->user;
    const int64_t last = user->first + user->writers;
    for (int64_t j = 0; j < x->wide; j++) {
        const int64_t from = smaller(j, x->end - 1);
        x->key_times[j] = user->times[from];
        x->key_domains[j] = (int32_t)user->domains[from];
        /* All readers stand where the last event does. */
        x->key_positions[j] = (int32_t)smaller(j, last);
    }
}

/* Buckets of the time from a vector of writings to a moment. */
static inline ints buckets_of(const Step *s, int64_t moment, const int64_t *written) {
    int64_t difference[LANES];
    for (int lane = 0; lane < LANES; lane++) difference[lane] = moment - written[lane];
    return time_bucket(difference, s->edges, (int32_t)s->never_written);
}

/* Works out the bias of the rows on all columns, whatever the head. */
static void look_up(const Walk *x) {
    const Step *s = x->s;
    const User *user = x->user;
    for (int64_t r = 0; r < x->rows; r++) {
        const Row *row = row_of(x, r);
        float *bias = x->bias + r * x->wide;
        const int32_t shift = (int32_t)(s->origin - row->position);
        for (int64_t j = 0; j < x->wide; j += LANES) {
            floats found = splat(0);
            if (s->positions) {
                const ints bucket = buckets_of(s, row->next_time, x->key_times + j);
                for (int lane = 0; lane < LANES; lane++)
                    found[lane] = s->positions[shift + x->key_positions[j + lane]] + s->times[bucket[lane]];
            }
            store(bias + j, found);
        }
        /* A row sees the writers up to itself, and a reader itself, unless it is virtual. */
        const int64_t number = x->first_row + r;
        for (int64_t i = 0; i < x->wide - user->first; i++) {
            const int is_seen = i < user->writers ? i <= number : i == number && !user->is_virtual;
            if (!is_seen || i >= user->count) bias[user->first + i] = -INFINITY;
        }
    }
    for (int64_t r = x->rows; r < ROWS; r++)
        for (int64_t j = 0; j < x->wide; j += LANES) store(x->bias + r * x->wide + j, splat(-INFINITY));
}

/* Turns products into weights: SiLU of scores where the head's rows see a column, else zero. */
static void weigh(const Walk *x, int64_t run) {
    for (int64_t r = 0; r < ROWS; r++) {
        const Row *row = row_of(x, r < x->rows ? r : 0);
        const int32_t domain = (int32_t)(run == OWN ? row->domain : row->target);
        for (int64_t j = 0; j < x->wide; j += LANES) {
            const floats bias = load(x->bias + r * x->wide + j);
            ints is_seen = bias > splat(-INFINITY);
            if (run != EVERYTHING) is_seen &= *(const ints *)(x->key_domains + j) == splat_int(domain);
            float *at = x->weights + r * x->wide + j;
            const floats score = load(at) + bias;
            store(at, keep(is_seen, score / (splat(1.0f) + exponential(-score))));
        }
    }
}

/* Sums a head's values by the weights of the rows. */
static void sum_values(const Walk *x, int64_t head, const float *values) {
    const Step *s = x->s;
    const int64_t full = x->end / LANES * LANES;
    for (int64_t c = 0; c < s->dv; c++) {
        const floats last = load(x->tail + (s->dqk + c) * LANES);
        floats total[ROWS] = {0};
        for (int64_t j = 0; j < full; j += LANES) {
            const floats value = load(values + c * x->user->capacity + j);
            for (int r = 0; r < ROWS; r++) total[r] += load(x->weights + r * x->wide + j) * value;
        }
        for (int64_t r = 0; r < x->rows; r++) {
            if (full < x->end) total[r] += load(x->weights + r * x->wide + full) * last;
            s->out[((x->user->row + x->first_row + r) * s->heads + head) * s->dv + c] = sum(total[r]);
        }
    }
}

static float *at_next(float **at, int64_t size) {
    float *found = *at;
    *at += round_up(size);
    return found;
}

static Walk begin(const Step *s, const User *user, int64_t end, Scratch *scratch) {
    Walk x = {.s = s, .user = user, .end = end, .wide = round_up(end), .dqk = round_up(s->dqk), .dv = round_up(s->dv)};
    const int64_t width = s->dqk + s->dv, rows = ROWS * (x.dqk + x.dv + 2 * x.wide);
    float *at = reserve(scratch, rows + width * LANES + x.wide * (4 + s->dqk + x.dv));
    x.queries = at_next(&at, ROWS * x.dqk);
    x.weights = at_next(&at, ROWS * x.wide);
    x.bias = at_next(&at, ROWS * x.wide);
    x.tail = at_next(&at, width * LANES);
    x.columns = at_next(&at, s->dqk * x.wide);
    x.values = at_next(&at, x.wide * x.dv);
    x.totals = at_next(&at, ROWS * x.dv);
    x.key_times = (int64_t *)at_next(&at, 2 * x.wide);
    x.key_domains = (int32_t *)at_next(&at, x.wide);
    x.key_positions = (int32_t *)at_next(&at, x.wide);
    return x;
}

static void read_rows(const Step *s, const User *user, Scratch *scratch) {
    Walk x = begin(s, user, user->first + user->count, scratch);
    describe_columns(&x);
    for (x.first_row = 0; x.first_row < user->count; x.first_row += ROWS) {
        x.rows = smaller(ROWS, user->count - x.first_row);
        look_up(&x);
        for (int64_t head = 0; head < s->heads; head++) {
            const int64_t full = x.end / LANES * LANES;
            const float *columns = put_rows(&x, head);
            take_queries(&x, head);
            multiply(x.queries, x.dqk, columns, s->dqk, user->capacity, full, x.weights, x.wide);
            if (full < x.end) multiply(x.queries, x.dqk, x.tail, s->dqk, LANES, LANES, x.weights + full, x.wide);
            weigh(&x, s->runs[head]);
            sum_values(&x, head, columns + s->dqk * user->capacity);
        }
    }
}

/* Makes the weights of a row's states: softmax of products and what their ages say. */
static void weigh_states(const Walk *x, int64_t r, const float *ages) {
    const Step *s = x->s;
    const User *user = x->user;
    const uint8_t *hidden = user->hidden + (x->first_row + r) * user->num_states;
    float *weights = x->weights + r * x->wide, top = -INFINITY, total = 0;
    for (int64_t j = 0; j < x->wide; j += LANES) {
        const ints bucket = ages ? buckets_of(s, row_of(x, r)->next_time, x->key_times + j) : splat_int(0);
        for (int64_t lane = 0; lane < LANES; lane++) {
            const int64_t slot = j + lane, is_initial = x->key_domains[slot];
            const int is_seen = slot < x->end && !hidden[slot];
            const float bias = ages ? ages[is_initial ? s->never_written : bucket[lane]] : 0;
            weights[slot] = is_seen ? weights[slot] + bias : -INFINITY;
            top = larger(top, weights[slot]);
        }
    }
    for (int64_t j = 0; j < x->wide; j += LANES) {
        const floats score = load(weights + j);
        const floats weight = keep(score > splat(-INFINITY), exponential(score - splat(top)));
        store(weights + j, weight);
        total += sum(weight);
    }
    for (int64_t j = 0; j < x->wide; j += LANES) store(weights + j, load(weights + j) / splat(total));
}

/* Tells when each state was written, and which are initial ones. */
static void describe_states(const Walk *x) {
    const User *user = x->user;
    const int64_t own = user->num_states - user->count;
    for (int64_t j = 0; j < x->wide; j++) {
        x->key_domains[j] = j >= user->states_in_memory && j < own;
        x->key_times[j] = 0;
        if (j < user->states_in_memory) x->key_times[j] = user->state_times[j];
        if (j >= own && j < x->end) x->key_times[j] = user->times[user->first + smaller(j - own, user->writers)];
    }
}

static void read_states(const Step *s, const User *user, Scratch *scratch) {
    Walk x = begin(s, user, user->num_states, scratch);
    const int64_t width = s->dqk + s->dv, own = user->num_states - user->count;
    describe_states(&x);
    for (int64_t head = 0; head < s->heads; head++) {
        float *states = user->states + (s->layer * s->heads + head) * user->num_states * width;
        for (int64_t i = 0; i < user->count; i++)
            copy(states + (own + i) * width, s->own + (user->row + i) * s->own_stride + head * width, width);
        clear(x.columns, s->dqk * x.wide);
        for (int64_t j = 0; j < x.end; j++) {
            for (int64_t c = 0; c < s->dqk; c++) x.columns[c * x.wide + j] = states[j * width + c];
            copy(x.values + j * x.dv, states + j * width + s->dqk, s->dv);
        }
        const float *ages = s->ages ? s->ages + head * (s->never_written + 1) : NULL;
        for (x.first_row = 0; x.first_row < user->count; x.first_row += ROWS) {
            x.rows = smaller(ROWS, user->count - x.first_row);
            take_queries(&x, head);
            multiply(x.queries, x.dqk, x.columns, s->dqk, x.wide, x.wide, x.weights, x.wide);
            for (int64_t r = 0; r < x.rows; r++) weigh_states(&x, r, ages);
            clear(x.totals, ROWS * x.dv);
            add_rows(x.weights, x.wide, x.values, x.dv, x.end, x.totals);
            for (int64_t r = 0; r < x.rows; r++)
                copy(s->out + ((user->row + x.first_row + r) * s->heads + head) * s->dv, x.totals + r * x.dv, s->dv);
        }
    }
}

typedef void (*Read)(const Step *, const User *, Scratch *);

static void for_all_users(const Step *s, Read read) {
#pragma omp parallel num_threads((int)s->threads) if (s->threads > 1)
    {
        Scratch scratch = {NULL, 0};
#pragma omp for schedule(dynamic)
        for (int64_t user = 0; user < s->num_users; user++) read(s, s->users + user, &scratch);
        free(scratch.at);
    }
}

void hstu_xd_read_rows(const Step *s) { for_all_users(s, read_rows); }
void hstu_xd_read_states(const Step *s) { for_all_users(s, read_states); }
