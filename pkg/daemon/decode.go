package daemon

import (
	"encoding"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/goccy/go-yaml/ast"
)

var (
	durationType = reflect.TypeFor[time.Duration]()
	textType     = reflect.TypeFor[encoding.TextUnmarshaler]()
)

// decode sets v from n. A key without a value leaves v as it is.
func (d decoder) decode(n ast.Node, v reflect.Value, key string) error {
	if _, empty := n.(*ast.NullNode); empty {
		return nil
	}
	if v.Kind() == reflect.Pointer {
		p := reflect.New(v.Type().Elem())
		if err := d.decode(n, p.Elem(), key); err != nil {
			return err
		}
		v.Set(p)
		return nil
	}
	if v.CanAddr() && v.Addr().Type().Implements(textType) {
		return d.decodeText(n, v, key)
	}
	switch {
	case v.Type() == durationType:
		return d.decodeDuration(n, v, key)
	case v.Kind() == reflect.Struct:
		return d.decodeStruct(n, v, key)
	case v.Kind() == reflect.Map && v.Type().Key().Kind() == reflect.String:
		return d.decodeMap(n, v, key)
	case v.Kind() == reflect.Slice:
		return d.decodeSlice(n, v, key)
	}
	return d.decodeScalar(n, v, key)
}

func (d decoder) decodeStruct(n ast.Node, v reflect.Value, key string) error {
	fields := map[string]int{}
	var known []string
	for i := range v.NumField() {
		if name := yamlName(v.Type().Field(i)); name != "" {
			fields[name] = i
			known = append(known, name)
		}
	}
	return d.eachPair(n, key, func(name string, at ast.Node, value ast.Node) error {
		i, ok := fields[name]
		if !ok {
			return d.invalid(at, "", fmt.Sprintf("unknown key %q; known are %s", join(key, clip(name)), strings.Join(known, ", ")))
		}
		return d.decode(value, v.Field(i), join(key, name))
	})
}

func (d decoder) decodeMap(n ast.Node, v reflect.Value, key string) error {
	v.Set(reflect.MakeMap(v.Type()))
	return d.eachPair(n, key, func(name string, _ ast.Node, value ast.Node) error {
		e := reflect.New(v.Type().Elem()).Elem()
		if err := d.decode(value, e, join(key, clip(name))); err != nil {
			return err
		}
		v.SetMapIndex(reflect.ValueOf(name).Convert(v.Type().Key()), e)
		return nil
	})
}

// eachPair calls fn for every pair of a mapping and refuses keys given twice.
func (d decoder) eachPair(n ast.Node, key string, fn func(name string, at, value ast.Node) error) error {
	m, ok := n.(ast.MapNode)
	if !ok {
		return d.invalid(n, key, "must be a mapping of keys to values")
	}
	lines := map[string]int{}
	for it := m.MapRange(); it.Next(); {
		at := it.Key()
		name := at.GetToken().Value
		if first, twice := lines[name]; twice {
			return d.invalid(at, "", fmt.Sprintf("key %q is given twice, first in line %d", join(key, clip(name)), first))
		}
		lines[name] = at.GetToken().Position.Line
		if err := fn(name, at, it.Value()); err != nil {
			return err
		}
	}
	return nil
}

func (d decoder) decodeSlice(n ast.Node, v reflect.Value, key string) error {
	seq, ok := n.(*ast.SequenceNode)
	if !ok {
		return d.invalid(n, key, "must be a list, as in ["+example(v.Type().Elem())+"]")
	}
	list := reflect.MakeSlice(v.Type(), len(seq.Values), len(seq.Values))
	for i, e := range seq.Values {
		if _, empty := e.(*ast.NullNode); empty {
			return d.invalid(e, fmt.Sprintf("%s[%d]", key, i), "is empty")
		}
		if err := d.decode(e, list.Index(i), fmt.Sprintf("%s[%d]", key, i)); err != nil {
			return err
		}
	}
	v.Set(list)
	return nil
}

func (d decoder) decodeText(n ast.Node, v reflect.Value, key string) error {
	s, ok := text(n)
	if !ok {
		return d.invalid(n, key, "must be text")
	}
	if err := v.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(s)); err != nil {
		return d.invalid(n, key, clipTo(200, oneLine(err.Error())))
	}
	return nil
}

func (d decoder) decodeDuration(n ast.Node, v reflect.Value, key string) error {
	s, ok := text(n)
	if !ok {
		return d.invalid(n, key, "must be a duration, such as 90s or 12h")
	}
	value, err := time.ParseDuration(s)
	if err != nil {
		return d.invalid(n, key, fmt.Sprintf("%q is not a duration: write a number and a unit, such as 90s or 12h", clip(s)))
	}
	v.SetInt(int64(value))
	return nil
}

func (d decoder) decodeScalar(n ast.Node, v reflect.Value, key string) error {
	s, ok := text(n)
	_, quoted := n.(*ast.StringNode)
	switch kind := v.Kind(); {
	case kind == reflect.String && ok:
		v.SetString(s)
	case kind == reflect.String:
		return d.invalid(n, key, "must be text: put the value in quotes if it is meant to be")
	case kind == reflect.Bool:
		b, isBool := n.(*ast.BoolNode)
		if !isBool {
			return d.invalid(n, key, "must be true or false")
		}
		v.SetBool(b.Value)
	case v.CanInt() && ok && !quoted:
		i, err := strconv.ParseInt(s, 10, v.Type().Bits())
		if err != nil {
			return d.invalid(n, key, fmt.Sprintf("%q is not a whole number in range, in decimal digits", clip(s)))
		}
		v.SetInt(i)
	case v.CanUint() && ok && !quoted:
		u, err := strconv.ParseUint(s, 10, v.Type().Bits())
		if err != nil {
			return d.invalid(n, key, fmt.Sprintf("%q is not a whole number in range, not negative, in decimal digits", clip(s)))
		}
		v.SetUint(u)
	case v.CanFloat() && ok && !quoted:
		f, err := strconv.ParseFloat(s, v.Type().Bits())
		if err != nil {
			return d.invalid(n, key, fmt.Sprintf("%q is not a number", clip(s)))
		}
		v.SetFloat(f)
	case v.CanInt(), v.CanUint(), v.CanFloat():
		return d.invalid(n, key, "must be a number in decimal digits, without quotes")
	default:
		return fmt.Errorf("decode configuration: %s has a type that can't be configured: %s", key, v.Type())
	}
	return nil
}

// text is what a scalar says, as it was written. Words that YAML reads as
// something else than text or a number are no text without quotes.
func text(n ast.Node) (string, bool) {
	switch n := n.(type) {
	case *ast.StringNode:
		return n.Value, true
	case *ast.LiteralNode:
		return n.Value.Value, true
	case *ast.IntegerNode, *ast.FloatNode:
		return n.GetToken().Value, true
	}
	return "", false
}

func example(t reflect.Type) string {
	if t.Kind() == reflect.String {
		return "one, two"
	}
	if t.Kind() == reflect.Struct {
		return "{...}, {...}"
	}
	return "1, 2"
}

// clip keeps a quoted piece of a file short.
func clip(s string) string { return clipTo(64, s) }

func clipTo(n int, s string) string {
	if r := []rune(s); len(r) > n {
		return string(r[:n]) + "…"
	}
	return s
}

// oneLine makes a text one line and leaves nothing in it that a terminal acts
// upon.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.Map(func(r rune) rune {
		if !unicode.IsPrint(r) {
			return ' '
		}
		return r
	}, s)), " ")
}
