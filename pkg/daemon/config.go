package daemon

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"reflect"
	"strings"

	"github.com/goccy/go-yaml"
	"github.com/goccy/go-yaml/ast"
	"github.com/goccy/go-yaml/lexer"
	"github.com/goccy/go-yaml/parser"
	"github.com/goccy/go-yaml/token"

	"github.com/seed-caa81108/assay/pkg/durable"
	"github.com/seed-caa81108/assay/pkg/fault"
)

const (
	// maxConfigBytes and maxDepth keep the parser, which is quadratic in
	// nesting, quick on any input.
	maxConfigBytes = 64 << 10
	maxDepth       = 16
)

// Load reads a YAML file into the struct that into points to. It is strict: a
// key that the struct does not know, a key given twice and a value of another
// type are errors with reason config_invalid that name line and key in one
// line. Fields are named by their yaml tags.
//
// Of YAML it takes mappings, sequences and scalars. Anchors, aliases, merges,
// tags, directives and second documents are refused: they are ways to write a
// configuration that reads differently from what it does.
func Load(path string, into any) error {
	data, err := readConfig(path)
	if err != nil {
		return err
	}
	return Decode(path, data, into)
}

// Decode reads YAML that does not come from a configuration file as Load reads
// that, whatever its size. name stands for the file in messages.
func Decode(name string, data []byte, into any) error {
	target := reflect.ValueOf(into)
	if target.Kind() != reflect.Pointer || target.Elem().Kind() != reflect.Struct {
		return fmt.Errorf("decode %s: %T is not a pointer to a struct", name, into)
	}
	return decodeConfig(name, data, target.Elem())
}

func readConfig(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(fault.Precondition, err, "config_missing", fmt.Sprintf("there is no file %s: write it, or name another with --config", path))
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_unreadable", path+" can't be opened: let this user read it")
	}
	defer func() { _ = f.Close() }() // only read
	if err := durable.CheckReadable(path); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(f, maxConfigBytes+1))
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "config_unreadable", path+" can't be read: it has to be a file")
	}
	if len(data) > maxConfigBytes {
		return nil, fault.Newf(fault.Precondition, "config_invalid", "%s has more than %d bytes: it is not the file that is meant", path, maxConfigBytes)
	}
	return data, nil
}

// decodeConfig parses data and fills target. file is for messages only.
func decodeConfig(file string, data []byte, target reflect.Value) error {
	d := decoder{file: file}
	tokens := lexer.Tokenize(string(data))
	if err := d.checkTokens(tokens); err != nil {
		return err
	}
	doc, err := parser.Parse(tokens, 0, parser.AllowDuplicateMapKey()) // the decoder's message on those is better
	if err != nil {
		return d.syntax(err)
	}
	for i, part := range doc.Docs {
		switch {
		case part.Body == nil:
		case i > 0:
			return d.invalid(part.Body, "", "a second document begins: keep one")
		default:
			if err := d.decode(part.Body, target, ""); err != nil {
				return err
			}
		}
	}
	return nil
}

// decoder turns YAML nodes into Go values and words the errors.
type decoder struct{ file string }

// checkTokens refuses what is not taken of YAML before the parser sees it.
func (d decoder) checkTokens(tokens token.Tokens) error {
	depth, entries, line := 0, 0, 0
	for _, t := range tokens {
		what := ""
		switch t.Type {
		case token.AnchorType, token.AliasType, token.MergeKeyType:
			what = "anchors, aliases and merges"
		case token.TagType:
			what = "tags"
		case token.DirectiveType:
			what = "directives"
		case token.MappingKeyType:
			what = "keys marked with ?"
		case token.MappingStartType, token.SequenceStartType:
			depth++
		case token.MappingEndType, token.SequenceEndType:
			depth--
		case token.SequenceEntryType:
			if t.Position.Line != line {
				line, entries = t.Position.Line, 0
			}
			entries++
		}
		if what != "" {
			return d.invalidLine(t, what+" are not taken: write the value itself")
		}
		if depth > maxDepth || entries > maxDepth {
			return d.invalidLine(t, "is nested too deeply")
		}
	}
	return nil
}

func (d decoder) syntax(err error) error {
	if e, ok := errors.AsType[yaml.Error](err); ok && e.GetToken() != nil {
		return d.invalidLine(e.GetToken(), clipTo(200, oneLine(e.GetMessage()))) // it quotes the file
	}
	return fault.Wrap(fault.Precondition, err, "config_invalid", d.file+" is not YAML")
}

func (d decoder) invalidLine(t *token.Token, text string) error {
	return fault.Newf(fault.Precondition, "config_invalid", "%s: line %d: %s", d.file, t.Position.Line, text)
}

// invalid names line and key of a node that can't be taken.
func (d decoder) invalid(n ast.Node, key, text string) error {
	if key != "" {
		text = key + ": " + text
	}
	return d.invalidLine(n.GetToken(), text)
}

// join names the key below another.
func join(key, name string) string {
	if key == "" {
		return name
	}
	return key + "." + name
}

// yamlName is the key of a struct's field, empty if it has none.
func yamlName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("yaml"), ",")
	if !f.IsExported() || name == "-" {
		return ""
	}
	return name
}
